"""The model of a run: read, given adapters or rows for new tokens, and told what of it is trained.

Replaces the middle of LLaVA's `train.py`. What is trained is decided once, in `freeze_plan`, and everything else here
follows it.
"""

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from .arguments import Arguments
from .formats.read import Source, load_llava
from .model.llava import LlavaModel
from .model.trained import apply_plan, freeze_plan, numel, trained_in_full
from .options import lora
from .options.attention import choose_attention
from .options.float8 import choose_float8, use_float8
from .options.image_tokens import add_token_rows
from .options.kernels import choose_fused_kernels, use_fused_kernels
from .options.quantisation import quantisation
from .options.token_rows import TokenRows, trained_ids
from .training.backend import is_offloaded, master_dtype, parameter_dtypes
from .training.optimizer import build_adamw, parameter_groups


def plan_of(arguments: Arguments, source: Source) -> dict[str, str]:
    """Return the freeze plan of a run: part -> "full", "frozen" or "LoRA r=..."."""
    lora_r = arguments.training.lora_r if arguments.training.lora_enable else None
    token_rows = bool(lora_r and (arguments.training.trainable_token_indices or arguments.model.add_tokens))
    has_newline = source.tiling is not None and source.tiling.has_newline
    return freeze_plan(arguments.model, lora_r, has_newline, token_rows, arguments.training.lora_vision_tower)


def build_model(
    arguments: Arguments,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: int,
    accelerator: Accelerator,
) -> tuple[LlavaModel, dict[str, str]]:
    """Build the model, not yet prepared, and its freeze plan: part -> "full", "frozen" or "LoRA r=...".

    Args:
        new_tokens: how many tokens at the end of the tokenizer are new to the language model.

    Raises:
        UserError: flags, model and projector do not fit together; the sentence names them.
    """
    model_flags, training = arguments.model, arguments.training
    plan = plan_of(arguments, source)
    in_float8 = choose_float8(training.fp8, source.language_config.model_type, accelerator.device)
    model = load_llava(
        source,
        choose_attention(
            model_flags.attn_implementation,
            source.language_config.model_type,
            arguments.data.packing,
            accelerator.device,
            half_precision=accelerator.mixed_precision != "no",
        ),
        parameter_dtypes(accelerator, trained_in_full(plan)),
        model_flags.pretrain_mm_mlp_adapter,
        quantisation(accelerator, training.bits, training.double_quant, training.quant_type),
        model_flags.mm_use_im_start_end,
    )
    if training.lora_enable:
        lora.add_lora(model.language_model, model_flags.model_name_or_path, training, master_dtype(accelerator))
    add_token_rows(
        model,
        tokenizer,
        new_tokens,
        (model_flags.mm_use_im_start_end, model_flags.mm_use_im_patch_token),
        model_flags.pretrain_mm_mlp_adapter,
    )
    if "new_tokens" in plan:
        ids, dtype = trained_ids(arguments, tokenizer), master_dtype(accelerator)
        model.new_tokens = TokenRows(model.language_model, ids, dtype, with_head=training.lora_enable)
    if training.lora_weight_path:
        lora.start_from(model, training.lora_weight_path)
    if training.lora_vision_tower:  # after the tower's weights were read, of which the saved adapters are a part
        lora.add_tower_lora(model.vision_tower, training, master_dtype(accelerator))
    apply_plan(model, plan)
    if choose_fused_kernels(training.use_liger_kernel, model.language_model.config.model_type, accelerator.device):
        use_fused_kernels(model.language_model)
    if in_float8:
        use_float8(model.language_model)
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable(training.gradient_checkpointing_share)
    return model, plan


def build_optimizer(
    arguments: Arguments, model: LlavaModel, plan: dict[str, str], accelerator: Accelerator
) -> tuple[torch.optim.AdamW, str]:
    """Build AdamW, each part of the model with its rate, and the table of what is trained."""
    training = arguments.training
    rates = {"projector": training.mm_projector_lr, "image_newline": training.mm_projector_lr}
    rates["vision_tower"] = training.mm_vision_tower_lr
    groups = parameter_groups(model, training.learning_rate, training.weight_decay, rates)
    betas, on_gpu = (training.adam_beta1, training.adam_beta2), accelerator.device.type == "cuda"
    optimizer = build_adamw(groups, betas, training.adam_epsilon, fused=on_gpu and not is_offloaded(accelerator))
    return optimizer, trainable_table(model, groups, plan)


def trainable_table(model: nn.Module, groups: list[dict], plan: dict[str, str]) -> str:
    """Return a table: the parts of the model, how each is trained, its peak learning rates and weight decays."""
    rows = [("part", "parameters", "trained", "how", "peak learning rate", "weight decay")]
    for part, module in model.named_children():
        parameters = list(module.named_parameters(prefix=part))
        total = sum(numel(parameter) for _, parameter in parameters)
        names = {name for name, parameter in parameters if parameter.requires_grad}
        trained = sum(numel(parameter) for name, parameter in parameters if name in names)
        mine = [group for group in groups if names & set(group["parameter_names"])]
        rates = " / ".join(sorted({f"{group['peak_lr']:g}" for group in mine})) or "-"
        decays = " / ".join(sorted({f"{group['weight_decay']:g}" for group in mine})) or "-"
        rows.append((part, f"{total:,}", f"{trained:,}", plan[part], rates, decays))
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
