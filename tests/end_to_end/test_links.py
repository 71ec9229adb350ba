"""Image folders made of symbolic links: refused with the flag that follows them, and followed by all who read."""

import json

import pytest

from mini_llava.tools import convert, doctor
from tests.end_to_end import runs
from tests.tools.test_convert import write_parquet


@pytest.fixture
def linked(tmp_path):
    """Flags of a run whose images lie behind a link that leads out of the image folder."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "coco").symlink_to(runs.FIXTURES / "data" / "images")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red one."}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": "coco/wide_rgb.png", "conversations": turns}] * 4))
    return {"data_path": tmp_path / "data.json", "image_folder": tmp_path / "images"}


STEPS = {"max_steps": 1, "warmup_ratio": 0, "global_batch_size": 4, "save_strategy": "no"}


@pytest.mark.parametrize("aspect_ratio", ["pad", "anyres"])
def test_a_run_follows_links_if_it_is_told_to_and_names_the_flag_if_not(linked, tmp_path, aspect_ratio):
    values = linked | STEPS | {"image_aspect_ratio": aspect_ratio, "eval_data_path": linked["data_path"]}
    values |= {"eval_image_folder": linked["image_folder"], "dataloader_num_workers": 2}
    line = runs.flags_of(2, tmp_path / "run", values)
    with pytest.raises(ValueError, match="by a symbolic link, which --follow_links True allows"):
        runs.train_here(line)
    runs.train_here([*line, "--follow_links", "True"])  # what was refused is not remembered
    assert [line["loss"] > 0 for line in runs.log(tmp_path / "run") if "loss" in line] == [True]


def test_the_doctor_and_convert_follow_them_too(linked, tmp_path, capsys):
    line = ["--data_path", str(linked["data_path"]), "--image_folder", str(linked["image_folder"])]
    line += ["--model_name_or_path", str(runs.FIXTURES / "llm"), "--tokens_per_image", "16"]
    line += ["--output", str(tmp_path / "bad.jsonl")]
    assert doctor.main(line) == 1
    assert "--follow_links True allows" in capsys.readouterr().out
    assert doctor.main([*line, "--follow_links", "True"]) == 0

    rows = write_parquet(tmp_path / "rows.parquet", [{"image": "coco/wide_rgb.png", "caption": "A red one."}])
    line = [str(rows), "--image_root", str(linked["image_folder"]), "--output"]
    assert convert.main([*line, str(tmp_path / "no")]) == 1
    assert convert.main([*line, str(tmp_path / "yes"), "--follow_links", "True"]) == 0
