"""Checks before step 1 that the parts of a run fit together.

LLaVA trains with an end mark that the tokenizer splits into letters, with a projector of another model, with a learning
rate of 0: such a run ends normally, and its model is worthless. `check_run` has all checks, for `train.py` and the
plan; the doctor takes those that need no model. They read configurations, tokenizer and lengths, and no weight.
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..arguments import Arguments, ModelArguments, TrainingArguments
from ..build import plan_of
from ..data.lengths import Lengths
from ..data.samples import Samples
from ..data.templates import CHAT_TEMPLATE, TEMPLATES, Template
from ..errors import UserError
from ..formats.layouts import FAMILIES
from ..formats.read import Source, empty_language_model, same_layer
from ..hub import read_json
from ..inputs import held_out_template
from ..model.projector import PROJECTOR_FILE, list_some
from ..options.chat_template import ChatTemplate
from ..options.image_tokens import token_ids_end
from ..options.lora import adapted_layers, linear_layers
from ..options.token_rows import trained_ids
from ..training.order import Order
from ..training.schedule import learning_rate_factor, warmup_steps
from ..words import counted

FINE, ODD, CONTRADICTION, IMPOSSIBLE = "fine", "odd", "contradiction", "impossible"
# Marks that are special tokens. [INST], <<SYS>> and ### are text in the models that have them.
MARK = re.compile(r"<\|[a-z0-9_]+\|>|</s>")
# Keys of the language model in the config.json of a projector.
SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Finding:
    """What a check found.

    verdict: FINE and ODD (a warning) are printed; CONTRADICTION ends the run, unless `--allow` names the check;
        IMPOSSIBLE always ends it.
    """

    check: str
    sentence: str
    verdict: str = FINE

    def line(self) -> str:
        """Return a line of a table: the check, and what was found."""
        return f"{self.check:14}{'' if self.verdict == FINE else 'Warning: '}{self.sentence}"


def check_run(
    arguments: Arguments, source: Source, samples: Samples, lengths: Lengths, order: Order, held_out_tokens: int = 0
) -> Iterator[Finding]:
    """Yield what each check finds. held_out_tokens: length of the longest held-out record; 0: none."""
    training = arguments.training
    yield from check_template(samples.template, samples.tokenizer)
    if (template := held_out_template(arguments, samples.tokenizer)) != samples.template:
        yield from check_template(template, samples.tokenizer, "--eval_version")
    rows = source.language_config.get_text_config().vocab_size
    yield from check_token_rows(samples.tokenizer, rows, samples.new_tokens)
    longest = max(int(lengths.length.max(initial=0)), held_out_tokens)
    yield from check_positions(longest, source.language_config)
    yield check_projector(arguments.model, source)
    if training.lora_enable:
        yield from check_adapters(source.language_config, training.lora_target_modules)
        yield from check_rows_beside_adapters(arguments, samples.tokenizer, samples.new_tokens)
    plan = plan_of(arguments, source)
    yield from check_steps(training, [part for part, method in plan.items() if method != "frozen"], order, lengths)


def refusals(findings: Iterable[Finding], allowed: Iterable[str] = ()) -> list[str]:
    """Return a sentence for each finding that ends the run. allowed: the checks that `--allow` names."""
    return [
        found.sentence + (f" If that is intended: --allow {found.check}." if found.verdict == CONTRADICTION else "")
        for found in findings
        if found.verdict == IMPOSSIBLE or (found.verdict == CONTRADICTION and found.check not in allowed)
    ]


def report(findings: Iterable[Finding], allowed: Iterable[str] | None = None) -> list[str]:
    """Return a heading and a line for each finding. Raises UserError with those that end the run."""
    findings = list(findings)
    if refused := refusals(findings, allowed or ()):
        raise UserError("\n".join(refused))
    return ["Checks before the first step:", *(found.line() for found in findings)]


# --- template and tokenizer ------------------------------------------------------------------------------------------


def check_template(
    template: Template | ChatTemplate, tokenizer: PreTrainedTokenizerBase, flag: str = "--version"
) -> Iterator[Finding]:
    """Yield whether the special tokens of a template, its end marks first, are tokens of this tokenizer.

    A mark that is split into ordinary tokens is learned as text, and `generate`, which stops at a token, does not stop.
    """
    name = tokenizer.name_or_path
    if template.captions_only:
        return
    if text_marks := [mark for mark in template.stop if not _is_one_token(mark, tokenizer)]:
        mark, pieces = text_marks[0], len(tokenizer.tokenize(text_marks[0]))
        what = f"splits into {pieces} tokens" if pieces > 1 else "takes for ordinary text"  # ### is a word to Llama
        sentence = f"{flag} {template.name} ends an answer with {mark}, which {name} {what}"
        if MARK.fullmatch(mark):
            sentence += f": nothing would end an answer. {_fitting_templates(tokenizer)}"
            yield Finding("template", sentence, CONTRADICTION)
        else:
            sentence += ": transformers' generate does not stop there, tools.chat does."
            yield Finding("template", sentence, ODD)
    elif split := [mark for mark in _marks(template) if not _is_one_token(mark, tokenizer)]:
        sentence = f"{flag} {template.name} writes {list_some(split)}, which {name} splits into ordinary tokens. "
        yield Finding("template", sentence + _fitting_templates(tokenizer), CONTRADICTION)
    else:
        ends = " or ".join(template.stop)
        yield Finding("template", f"{template.name} ends an answer with {ends}, one token of {name}.")


def _marks(template: Template | ChatTemplate) -> list[str]:
    """Return the special tokens that a template writes."""
    if isinstance(template, ChatTemplate):  # the tokenizer's own
        return list(template.stop)
    texts = (template.opening, template.next_question, template.question_end, template.answer_start)
    return list(dict.fromkeys(MARK.findall("".join((*texts, template.answer_end, template.round_end)))))


def _is_one_token(mark: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a mark is one token in any text, at which `generate` can stop."""
    return mark in tokenizer.added_tokens_encoder or mark in tokenizer.all_special_tokens


def _fitting_templates(tokenizer: PreTrainedTokenizerBase) -> str:
    names = [
        name
        for name, template in TEMPLATES.items()
        if name == template.name  # and no other name of it
        and MARK.search("".join(template.stop))
        and all(_is_one_token(mark, tokenizer) for mark in _marks(template))
    ]
    names += [CHAT_TEMPLATE] * bool(tokenizer.chat_template)
    return f"Templates whose marks are its tokens: {', '.join(names)}." if names else "No template here fits it."


def check_token_rows(tokenizer: PreTrainedTokenizerBase, rows: int, new_tokens: int) -> Iterator[Finding]:
    """Yield whether the word embeddings, with `rows` as stored and `new_tokens` to be added, have each token."""
    name, end = tokenizer.name_or_path, token_ids_end(tokenizer)
    missing = end - new_tokens - rows
    if missing > 0:
        yield Finding(
            "tokens",
            f"The tokenizer of {name} has ids up to {end - new_tokens - 1}, but the language model's embeddings have "
            f"{rows} rows: {counted(missing, 'row')} missing. Take the tokenizer that belongs to the model, "
            f"or add rows with --resize_token_embeddings True.",
            IMPOSSIBLE,
        )
    else:
        added = f", {new_tokens} of them with new rows" if new_tokens else ""
        yield Finding(
            "tokens", f"The tokenizer has {len(tokenizer):,}{added}; the embeddings have {max(rows, end):,} rows."
        )


def check_positions(longest: int, language_config: PreTrainedConfig) -> Iterator[Finding]:
    """Yield whether the longest sample, image tokens included, has no more positions than the language model.

    A table of learned positions ends there; rotary positions go on, but were not trained.
    """
    positions = _known_positions(language_config)
    if positions is None:
        return
    if longest <= positions:
        yield Finding("positions", f"The longest sample takes {longest:,} of the language model's {positions:,}.")
        return
    sentence = (
        f"The longest sample has {longest:,} tokens, more than the {positions:,} positions that the language model "
        f"({language_config.model_type}) was made for: --model_max_length {positions} truncates it to them."
    )
    yield Finding("positions", sentence, IMPOSSIBLE if _has_position_table(language_config, positions) else ODD)


def _known_positions(language_config: PreTrainedConfig) -> int | None:
    """Return how many positions a language model was made for, RoPE scaling included; None without a limit."""
    config = language_config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not positions or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    factor = rope.get("factor")
    original = rope.get("original_max_position_embeddings") or positions
    return max(positions, int(original * factor)) if isinstance(factor, int | float) else positions


def _has_position_table(language_config: PreTrainedConfig, positions: int) -> bool:
    """Return whether another embedding than that of the words has a row for each position (OPT's has two more)."""
    model = empty_language_model(language_config)
    if model is None:
        return False
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    return any(0 <= table.num_embeddings - positions <= 8 for table in tables)


# --- projector -------------------------------------------------------------------------------------------------------


def check_projector(flags: ModelArguments, source: Source) -> Finding:
    """Return where the projector comes from, and whether its config.json names the other parts of this run."""
    given = flags.pretrain_mm_mlp_adapter
    if not given and "projector" in source.stored:
        return Finding("projector", f"It starts from the one in {source.name}.")
    if not given and flags.tune_mm_mlp_adapter:
        return Finding("projector", "It starts from random weights.")
    if not given:
        why = "It starts from random weights, without a stage 1; --pretrain_mm_mlp_adapter takes the projector of one."
        return Finding("projector", why, ODD)
    file = Path(given) / PROJECTOR_FILE if Path(given).is_dir() else Path(given)
    if not file.exists():  # in a plan; a run has checked
        return Finding("projector", f"It starts from {given}, which does not exist yet.", ODD)
    config = file.with_name("config.json")
    said = read_json(file.parent, config.name) if config.is_file() else {}
    if differing := list(_projector_differences(said, flags, source)):
        why = (
            f"--pretrain_mm_mlp_adapter {given} was trained with other parts, as {config} says: {'; '.join(differing)}."
        )
        return Finding("projector", why, CONTRADICTION)
    if "mm_vision_tower" not in said and "vision_config" not in said:
        why = f"It starts from {given}; no config.json next to it says which model it was trained for."
        return Finding("projector", why, ODD)
    if said.get("tune_mm_mlp_adapter"):
        return Finding(
            "projector", f"It starts from {given}, trained for {said.get('_name_or_path') or 'such a model'}."
        )
    why = f"It starts from {given}, which was trained together with a different language model."
    return Finding("projector", why, ODD)


def _projector_differences(said: dict, flags: ModelArguments, source: Source) -> Iterator[str]:
    """Yield each value in the config.json of a projector that differs in this run."""
    if "vision_config" in said and "text_config" in said:  # a whole model in transformers' layout
        text = said["text_config"]
        said = {key: said[key] for key in ("mm_use_im_start_end", "_name_or_path") if key in said} | {
            "mm_vision_select_layer": said.get("vision_feature_layer"),
            "mm_hidden_size": said["vision_config"].get("hidden_size"),
            "model_type": text.get("model_type"),
            **{key: text[key] for key in SHAPE if key in text},
        }
    here = source.language_config.get_text_config()
    name = said.get("_name_or_path") if source.layout == "language_model" else None
    if name and _plain_name(name) != _plain_name(source.name):
        yield f"the language model {name}, here {source.name}"
    family = str(said.get("model_type", "")).removeprefix("llava").removeprefix("_")
    family = FAMILIES.get(family, family)
    if family and family != here.model_type:
        yield f"a language model of type {family}, here {here.model_type}"
    for key in SHAPE:
        theirs, mine = said.get(key), getattr(here, key, None)
        if theirs is not None and mine is not None and theirs != mine:
            yield f"{key} {theirs}, here {mine}"
    tower = said.get("mm_vision_tower")
    if tower and source.vision_tower and _plain_name(tower) != _plain_name(source.vision_tower):
        yield f"the vision tower {tower}, here {source.vision_tower}"
    for key, mine in (
        ("mm_hidden_size", source.vision_config.hidden_size),
        ("mm_projector_type", source.projector_type),
        ("mm_vision_select_feature", source.select_feature),
        ("mm_use_im_start_end", flags.mm_use_im_start_end),
    ):
        if said.get(key) not in (None, mine):
            yield f"{key} {said[key]}, here {mine}"
    layer = said.get("mm_vision_select_layer")
    if layer is not None and not same_layer(layer, source.select_layer, source.vision_config):
        yield f"mm_vision_select_layer {layer}, here {source.select_layer}"


def _plain_name(name: str) -> str:
    """Return a model's name without folder and punctuation: vicuna-7b-v1-5 is lmsys/vicuna-7b-v1.5."""
    path = Path(os.path.abspath(name))
    for part in path.parts:
        if part.startswith("models--"):  # the hub's cache
            return _plain_name(part.rpartition("--")[2])
    return re.sub(r"[^a-z0-9]", "", path.name.lower())


# --- what is trained, and how long -----------------------------------------------------------------------------------


def check_adapters(language_config: PreTrainedConfig, targets: list[str] | None = None) -> Iterator[Finding]:
    """Yield whether LoRA adapts every weight matrix of the language model's layers, or those that are asked for.

    It adapts linear layers. Mixtures of experts have a layer's experts in one tensor, so that most of the model would
    stay frozen.
    """
    model = empty_language_model(language_config)
    if model is None:
        return
    layers = linear_layers(model)
    if len(chosen := adapted_layers(model, targets)) < len(layers):
        kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in chosen))
        where = f"{len(chosen)} of the {counted(len(layers), 'linear layer')} of the language model, {list_some(kinds)}"
        yield Finding("adapters", f"They are on {where}, as --lora_target_modules says.")
        return
    reached = {f"{name}.weight" for name in layers}
    head = model.get_output_embeddings()
    outside = [
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding) or module is head
    ]
    missed = [(name, p) for name, p in model.named_parameters() if p.dim() > 1 and name not in {*reached, *outside}]
    if missed:
        share = sum(p.numel() for _, p in missed) / sum(p.numel() for p in model.parameters())
        verdict = CONTRADICTION if share > 0.01 else ODD  # more than a router or a short convolution
        names = list(dict.fromkeys(name.rpartition(".layers.")[2].partition(".")[2] or name for name, _ in missed))
        yield Finding(
            "adapters",
            f"--lora_enable adapts linear layers; {list_some(names)} of each layer, {share:.0%} of the language model "
            f"({language_config.model_type}), are not linear layers and would stay as they are.",
            verdict,
        )
    else:
        beside = counted(len(layers), "linear layer")
        yield Finding("adapters", f"They are on all {beside} of the language model except its head.")


def check_rows_beside_adapters(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase, new_tokens: int
) -> Iterator[Finding]:
    """Yield which rows of the word embeddings are trained beside adapters, and which may be new and are not.

    That a token of the tokenizer is new to the language model shows only where its row is added here.
    """
    trained, end = trained_ids(arguments, tokenizer), token_ids_end(tokenizer)
    names = tokenizer.convert_ids_to_tokens(trained)
    if trained:
        sentence = f"Trained along with them: the rows of {counted(len(names), 'token')}, {list_some(names)}."
        yield Finding("adapters", sentence)
    frozen = [index for index in sorted(tokenizer.added_tokens_decoder) if index not in trained]
    new = [index for index in range(end - new_tokens, end) if index not in trained]
    known = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    what, ids = ("new", new) if new else ("added", [index for index in frozen if index >= known])
    if ids:
        listed = list_some(tokenizer.convert_ids_to_tokens(ids))
        sentence = (
            f"The rows of {counted(len(ids), f'{what} token')} stay as they are ({listed}): LoRA trains no embeddings "
            "except those that --trainable_token_indices names."
        )
        yield Finding("adapters", sentence, ODD if new else FINE)


def check_steps(
    training: TrainingArguments, trained: Collection[str], order: Order, lengths: Lengths
) -> Iterator[Finding]:
    """Yield whether there is a step with a learning rate other than 0 for any of the parts that are `trained`."""
    records, total, sampler = len(lengths.length), order.total_steps, order.sampler
    if len(order.bad) == records:
        yield Finding("steps", f"All {records:,} records would be skipped: nothing is left to train on.", IMPOSSIBLE)
        return
    warmup = warmup_steps(training.warmup_ratio, total, training.warmup_steps)
    own = {"projector": training.mm_projector_lr, "vision_tower": training.mm_vision_tower_lr}
    own["image_newline"] = own["projector"]
    peaks = [training.learning_rate if own.get(part) is None else own[part] for part in trained]
    factors = (learning_rate_factor(training.lr_scheduler_type, step, total, warmup) for step in range(total))
    few = ""
    if records < sampler.global_batch_size:
        few = (
            f" {counted(records, 'record')} {'is' if records == 1 else 'are'} fewer than a global batch: lower "
            f"--global_batch_size ({sampler.global_batch_size}), or raise "
            f"--{'max_steps' if training.max_steps > 0 else 'num_train_epochs'}."
        )
    if not any(peaks) or not any(factors):
        when = f"in all {total:,} steps" if total > 1 else "in the only step"
        flag = "warmup_steps" if training.warmup_steps else "warmup_ratio"
        why = f" It rises from 0: --{flag} 0 leaves that out." if any(peaks) else ""
        yield Finding(
            "learning_rate", f"The learning rate would be 0 {when}, and train nothing.{why}{few}", CONTRADICTION
        )
    else:
        first = "step" if warmup == 1 else f"{warmup:,} steps"
        rises = f"; the learning rate rises in the first {first}" if warmup else ""
        yield Finding("steps", f"{counted(total, 'step')}{rises}.{few}", ODD if few else FINE)


def ddp_memory_note(accelerator: Accelerator, model: nn.Module) -> str | None:  # pragma: no cover, needs a GPU
    """Return a sentence about what DDP, the bare `accelerate launch` on several GPUs, costs on each; None elsewhere."""
    if accelerator.distributed_type != DistributedType.MULTI_GPU:
        return None
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen = sum(
        parameter.numel() * parameter.element_size() for parameter in parameters if not parameter.requires_grad
    )
    # fp32 weights, gradients, DDP's copy of them in its buckets, and two moments.
    return (
        f"DDP keeps all weights, gradients and moments on every GPU, {(20 * trained + frozen) / 2**30:.1f} GiB each "
        "before activations; --config_file accelerate_configs/zero3.yaml divides them among the GPUs."
    )
