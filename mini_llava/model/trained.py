"""What is trained and how: one plan, made in one place from the flags, and the table that shows it.

In LLaVA this is spread over `train.py` (`freeze_backbone`, `tune_mm_mlp_adapter`, LoRA, ...), applied in an order in
which later lines undo earlier ones. Here the flags give a plan, contradictions are errors (see `arguments.py`), and
what the table shows is what a step changes.
"""

from torch import nn

from .llava import LlavaModel


def freeze_plan(
    tune_mm_mlp_adapter: bool,
    freeze_mm_mlp_adapter: bool,
    freeze_backbone: bool,
    unfreeze_mm_vision_tower: bool,
    lora_r: int | None = None,
    new_tokens: bool = False,
    image_newline: bool = False,
) -> dict[str, str]:
    """How each child of `LlavaModel` is trained: `full`, `frozen` or `LoRA r=<rank>`, the last if a rank is given.

    `new_tokens`, the rows of LLaVA's legacy image tokens, are a part of their own where the projector alone is trained:
    the language model is frozen, and they are not. Otherwise they are the language model's. `image_newline`, for images
    in tiles, goes with the projector.
    """
    if tune_mm_mlp_adapter:
        plan = {"vision_tower": "frozen", "projector": "full", "language_model": "frozen"}
        plan |= {"image_newline": "full"} if image_newline else {}
        return plan | ({"new_tokens": "full"} if new_tokens else {})
    language_model = "full" if lora_r is None else f"LoRA r={lora_r}"
    plan = {
        "vision_tower": "full" if unfreeze_mm_vision_tower else "frozen",
        "projector": "frozen" if freeze_mm_mlp_adapter else "full",
        "language_model": "frozen" if freeze_backbone else language_model,
    }
    if image_newline:
        plan["image_newline"] = plan["projector"]
    if set(plan.values()) == {"frozen"}:
        raise ValueError("--freeze_mm_mlp_adapter and --freeze_backbone leave nothing to train.")
    return plan


def trained_in_full(plan: dict[str, str]) -> set[str]:
    """The parts whose own weights are trained."""
    return {part for part, how in plan.items() if how == "full"}


def apply_plan(model: LlavaModel, plan: dict[str, str]) -> None:
    """Sets `requires_grad` of every parameter; what lies behind the tower's selected layer can get no gradient.

    Where adapters were added, PEFT has already set it: adapters, and biases if they were asked for.
    """
    unused = model.vision_tower.unused_parameters()
    for part, module in model.named_children():
        if plan[part] not in ("full", "frozen"):
            continue
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(plan[part] == "full" and not (part == "vision_tower" and name in unused))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("Nothing is left to train: the projector of type identity has no parameters.")


def trainable_table(model: nn.Module, groups: list[dict], plan: dict[str, str]) -> str:
    """Parts of the model, how each is trained, and the peak learning rate and weight decay of its groups."""
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


def numel(parameter: nn.Parameter) -> int:
    """Of the whole parameter as a matrix, divided or quantised though it may be."""
    if quantised := getattr(parameter, "quant_state", None):  # bitsandbytes packs two 4-bit weights into a byte
        return quantised.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 the tensor itself is empty
