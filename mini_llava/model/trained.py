"""What is trained and how: one plan, made in one place from the flags.

In LLaVA this is spread over `train.py` (`freeze_backbone`, `tune_mm_mlp_adapter`, LoRA, ...), applied in an order in
which later lines undo earlier ones. Here the flags give a plan, and contradictions are errors (see `arguments.py`).
"""

from torch import nn

from ..arguments import ModelArguments
from ..errors import UserError
from .llava import LlavaModel


def freeze_plan(
    flags: ModelArguments,
    lora_r: int | None = None,
    image_newline: bool = False,
    token_rows: bool = False,
    lora_in_tower: bool = False,
) -> dict[str, str]:
    """Return how each child of `LlavaModel` is trained: `full`, `frozen` or, if a rank is given, `LoRA r=<rank>`.

    `tune_mm_mlp_adapter` is stage 1's preset: the projector alone is trained. The rows of LLaVA's legacy image tokens
    are then trained as a module of their own, `new_tokens`; otherwise they are rows of the language model's embeddings.
    `token_rows`: so are single rows along with adapters. `lora_in_tower`: the tower has adapters, too.
    `image_newline`, for images in tiles, goes with the projector.
    """
    if flags.tune_mm_mlp_adapter:
        plan = {"vision_tower": "frozen", "projector": "full", "language_model": "frozen"}
        plan |= {"image_newline": "full"} if image_newline else {}
        return plan | ({"new_tokens": "full"} if flags.mm_use_im_start_end else {})
    language_model = "full" if lora_r is None else f"LoRA r={lora_r}"
    vision_tower = "full" if flags.unfreeze_mm_vision_tower else "frozen"
    plan = {
        "vision_tower": language_model if lora_in_tower else vision_tower,
        "projector": "frozen" if flags.freeze_mm_mlp_adapter else "full",
        "language_model": "frozen" if flags.freeze_backbone else language_model,
    }
    if image_newline:
        plan["image_newline"] = plan["projector"]
    if token_rows:
        plan["new_tokens"] = "full"
    if set(plan.values()) == {"frozen"}:
        raise UserError("--freeze_mm_mlp_adapter and --freeze_backbone leave nothing to train.")
    return plan


def trained_in_full(plan: dict[str, str]) -> set[str]:
    """Return the parts whose own weights are trained."""
    return {part for part, training in plan.items() if training == "full"}


def apply_plan(model: LlavaModel, plan: dict[str, str]) -> None:
    """Set `requires_grad` of every parameter; nothing after the tower's selected layer can get a gradient.

    Where adapters were added, PEFT has already set it: adapters, and biases if they were asked for.
    """
    unused = model.vision_tower.unused_parameters() if plan["vision_tower"] == "full" else set()
    for part, module in model.named_children():
        if plan[part] not in ("full", "frozen"):
            continue
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(plan[part] == "full" and not (part == "vision_tower" and name in unused))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("Nothing is left to train: the projector of type identity has no parameters.")


def numel(parameter: nn.Parameter) -> int:
    """Return the number of elements of the whole parameter, also where it is partitioned or quantised."""
    if quantised := getattr(parameter, "quant_state", None):  # bitsandbytes packs two 4-bit weights into a byte
        return quantised.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 the tensor itself is empty
