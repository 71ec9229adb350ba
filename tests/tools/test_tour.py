"""The tour shows what a training step of `train.py` does to the same records, and README shows what the tour prints."""

import json
import re
import shlex

import pytest
from accelerate.state import AcceleratorState

from mini_llava import demo
from mini_llava.tools import tour
from tests.end_to_end import runs
from tests.readme import block_with, blocks


@pytest.fixture
def printed(capsys, monkeypatch):
    def run(*words) -> str:
        AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier run in this process left
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        capsys.readouterr()
        assert tour.main(list(map(str, words))) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def norms(text: str) -> dict[str, list[float]]:
    """Part of the model -> its gradient's norm in this stage and in the other one, 0 for none."""
    table = text[text.rindex("\n11. ") :]
    rows = re.findall(r"^  (\w+) +([\d.]+|none) +([\d.]+|none)$", table, re.MULTILINE)
    return {part: [0.0 if value == "none" else float(value) for value in values] for part, *values in rows}


@pytest.mark.parametrize("stage", [1, 2])
def test_its_loss_and_gradient_are_those_of_a_training_step_on_the_same_records(stage, printed, tmp_path):
    order = tmp_path / "order.json"
    order.write_text("[[0, 3]]")
    common = {"learning_rate": 1e-3, "warmup_ratio": 0, "packing": True}
    step = {"sample_order": order, "max_steps": 1, "global_batch_size": 2, "save_strategy": "no"}
    runs.train_here(runs.flags_of(stage, tmp_path / "run", common | step))
    [entry] = runs.log(tmp_path / "run")

    text = printed("--record", 0, 3, *runs.flags_of(stage, tmp_path / "tour", common))
    assert float(re.search(r"^  loss ([\d.]+) = ", text, re.MULTILINE)[1]) == pytest.approx(entry["loss"], abs=1e-4)
    parts = norms(text)
    of_the_step = sum(value**2 for value, _ in parts.values()) ** 0.5
    assert of_the_step == pytest.approx(entry["gradient_norm"], abs=2e-4)  # four digits of two parts
    assert parts["projector"][0] > 0
    assert parts["projector"][0] == pytest.approx(parts["projector"][1], abs=2e-4)
    assert parts["vision_tower"] == [0, 0]
    assert [value > 0 for value in parts["language_model"]] == [stage == 2, stage == 1]
    assert not (tmp_path / "tour").exists()


def test_it_shows_adapters_images_in_tiles_and_padded_rows(printed, tmp_path):
    flags = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[(112,56),(56,112)]"}
    text = printed(*runs.flags_of(2, tmp_path, flags | {"lora_enable": True, "packing": False}))
    assert "4. ImageReader.open (data/images.py): its image, anyres" in text and "padded to the longest" in text
    assert "attention_mask   bool [2, " in text and "feature_rows     int64 [" in text
    parts = norms(text)
    assert parts["language_model"][0] > 0 == parts["language_model"][1]  # adapters, which stage 1 does not train
    assert parts["image_newline"][0] > 0
    assert parts["image_newline"][0] == pytest.approx(parts["image_newline"][1], rel=0.01)  # bf16, masters or not


def test_a_record_that_is_not_there_or_cannot_be_trained_on_is_a_sentence(capsys, tmp_path):
    records = json.loads((runs.FIXTURES / "data" / "train_stage2.json").read_text(encoding="utf-8"))
    records[1]["conversations"] = records[1]["conversations"][:1]
    (tmp_path / "some.json").write_text(json.dumps(records[:2]))
    common = ["--data_path", tmp_path / "some.json"]
    for number, sentence in ((2, "--record 2: the data have 2 records"), (1, "no question has an answer")):
        words = [*runs.flags_of(2, tmp_path, {}), *common, "--record", number]
        AcceleratorState._reset_state(reset_partial_state=True)
        assert tour.main(list(map(str, words))) == 2
        assert sentence in capsys.readouterr().err


def test_readme_shows_what_it_prints(printed, tmp_path, monkeypatch):
    """But for fractions, which depend on the machine's arithmetic and on whether stage 1 has been run."""
    command = block_with("python -m mini_llava.tools.tour")
    shown = blocks()[blocks().index(command) + 1]
    (tmp_path / "mini_llava").symlink_to(demo.HERE.parent)
    monkeypatch.chdir(tmp_path)
    program, dash_m, module, *words = shlex.split(command)
    assert (program, dash_m, module) == ("python", "-m", "mini_llava.tools.tour")

    def known(text: str) -> list[str]:
        text = re.sub(r"-?\d+\.\d+(e-\d+)?%?|(?<= )-?0(?= )| '[^']*'$", "#", text, flags=re.MULTILINE)
        return [" ".join(line.split()) for line in text.splitlines()]

    lines = known(printed(*words))
    for line in known(shown):
        start = line.removesuffix("…")
        assert not line or any(other.startswith(start) for other in lines), line
