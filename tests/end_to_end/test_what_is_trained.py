"""What the printed table declares to be trained is what one step changes, to the tensor."""

import itertools

import pytest
import torch

from mini_llava import build
from tests.end_to_end import runs

CASES = {
    "stage1": (1, {}, {"projector"}),
    "stage1-mm_use_im_start_end": (1, {"mm_use_im_start_end": True}, {"projector", "new_tokens"}),
    "stage2": (2, {}, {"projector", "language_model"}),
    "freeze_backbone": (2, {"freeze_backbone": True}, {"projector"}),
    "freeze_mm_mlp_adapter": (2, {"freeze_mm_mlp_adapter": True}, {"language_model"}),
    "unfreeze_mm_vision_tower": (
        2,
        {"unfreeze_mm_vision_tower": True},
        {"projector", "language_model", "vision_tower"},
    ),
    "unfreeze_mm_vision_tower alone": (
        2,
        {"unfreeze_mm_vision_tower": True, "freeze_backbone": True, "freeze_mm_mlp_adapter": True},
        {"vision_tower"},
    ),
    "lora_enable": (2, {"lora_enable": True}, {"projector", "language_model"}),
    "lora_enable, freeze_mm_mlp_adapter": (
        2,
        {"lora_enable": True, "freeze_mm_mlp_adapter": True},
        {"language_model"},
    ),
    "lora_enable, unfreeze_mm_vision_tower": (
        2,
        {"lora_enable": True, "unfreeze_mm_vision_tower": True},
        {"projector", "language_model", "vision_tower"},
    ),
}


def printed_table(text: str) -> dict[str, tuple[int, int]]:
    """Part of the model -> (parameters, trained parameters)."""
    lines = text.splitlines()
    header = next(number for number, line in enumerate(lines) if line.split()[:3] == ["part", "parameters", "trained"])
    table = {}
    for line in itertools.takewhile(str.strip, lines[header + 1 :]):
        part, total, trained = line.replace(",", "").split()[:3]
        table[part] = int(total), int(trained)
    return table


@pytest.mark.parametrize(("stage", "more", "parts"), CASES.values(), ids=CASES)
def test_one_step_changes_exactly_what_the_table_declares(tmp_path, monkeypatch, capsys, stage, more, parts):
    kept = {}

    def apply_and_keep(model, plan):
        applied(model, plan)
        if "lora_enable" in more:  # as they come out of a run: new, one factor is zero, and the other has no gradient
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        kept["model"], kept["before"] = model, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    applied = build.apply_plan
    monkeypatch.setattr(build, "apply_plan", apply_and_keep)  # the real model; the test keeps hold of it
    one_step = {"max_steps": 1, "warmup_ratio": 0, "learning_rate": 1e-3, "global_batch_size": 4}
    order = tmp_path / "order.json"
    order.write_text(str([runs.GLOBAL_BATCHES["2-images-2-texts"]]))
    runs.train_here(runs.flags_of(stage, tmp_path / "run", {**one_step, "sample_order": order, **more}))

    after = kept["model"].state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, kept["before"][name])}
    table = printed_table(capsys.readouterr().out)
    declared = {name for name, parameter in kept["model"].named_parameters() if parameter.requires_grad}
    changed |= {name for name in declared if runs.is_rounding(name)}  # by how little it may be nothing
    assert changed == declared
    assert {name.split(".")[0] for name in changed} == parts
    for part, (total, trained) in table.items():
        mine = [name for name in after if name.startswith(f"{part}.")]
        assert sum(after[name].numel() for name in mine) == total
        assert sum(after[name].numel() for name in mine if name in changed) == trained, part

    if "lora_enable" in more:
        in_language_model = {name for name in changed if name.startswith("language_model")}
        assert len(in_language_model) == 2 * 14 and all(".lora_" in name for name in in_language_model)

    if "vision_tower" in parts:
        unused = {name for name in after if name.startswith("vision_tower") and name not in changed}
        assert unused and all("layers.2." in name or "post_layernorm" in name for name in unused)
