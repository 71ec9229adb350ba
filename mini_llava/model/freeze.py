"""What is trained: one plan, made in one place from the flags, and the table that shows it.

In LLaVA this is spread over `train.py` (`freeze_backbone`, `tune_mm_mlp_adapter`, ...), applied in an order in which
later lines undo earlier ones. Here the flags give a set of trained parts, contradictions are errors (see
`arguments.py`), and what the table shows is what a step changes.
"""

from torch import nn

from .llava import LlavaModel


def trained_parts(
    tune_mm_mlp_adapter: bool, freeze_mm_mlp_adapter: bool, freeze_backbone: bool, unfreeze_mm_vision_tower: bool
) -> set[str]:
    """Names of the trained children of `LlavaModel`."""
    if tune_mm_mlp_adapter:
        return {"projector"}
    parts = {"projector", "language_model", "vision_tower"}
    if freeze_mm_mlp_adapter:
        parts.remove("projector")
    if freeze_backbone:
        parts.remove("language_model")
    if not unfreeze_mm_vision_tower:
        parts.remove("vision_tower")
    if not parts:
        raise ValueError("--freeze_mm_mlp_adapter and --freeze_backbone leave nothing to train.")
    return parts


def apply_plan(model: LlavaModel, parts: set[str]) -> None:
    """Sets `requires_grad` of every parameter; what lies behind the tower's selected layer can get no gradient."""
    unused = model.vision_tower.unused_parameters()
    for part, module in model.named_children():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(part in parts and not (part == "vision_tower" and name in unused))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("Nothing is left to train: the projector of type identity has no parameters.")


def trainable_table(model: nn.Module, groups: list[dict]) -> str:
    """Parts of the model, their parameters, and the rate and weight decay each trained group has."""
    rows = [("part", "parameters", "trained", "peak learning rate", "weight decay")]
    for part, module in model.named_children():
        parameters = list(module.named_parameters(prefix=part))
        total = sum(_numel(parameter) for _, parameter in parameters)
        names = {name for name, parameter in parameters if parameter.requires_grad}
        trained = sum(_numel(parameter) for name, parameter in parameters if name in names)
        mine = [group for group in groups if names & set(group["parameter_names"])]
        rates = " / ".join(sorted({f"{group['peak_lr']:g}" for group in mine})) or "-"
        decays = " / ".join(sorted({f"{group['weight_decay']:g}" for group in mine})) or "-"
        rows.append((part, f"{total:,}", f"{trained:,}" if trained else "frozen", rates, decays))
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 the tensor itself is empty
