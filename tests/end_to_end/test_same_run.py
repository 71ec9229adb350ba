"""What a resumed run compares beside flags and models: the images, and under what conditions its sums are rounded."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from mini_llava.training.checkpoint import CheckpointError, read_manifest
from tests.end_to_end import runs

pytestmark = pytest.mark.slow

PICTURE = "square_rgb.png"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A folder with images, records and the run that has come to step 2 of 4."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(runs.FIXTURES / "data" / "images", folder / "images")
    runs.train_here(flags(folder, max_steps=4))
    shutil.rmtree(folder / "run" / "checkpoint-4")
    return folder


@pytest.fixture
def folder(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "copy"))  # with other dates, elsewhere


def flags(folder: Path, **more) -> list[str]:
    values = {"global_batch_size": 4, "per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2}
    return runs.flags_of(2, folder / "run", values | {"image_folder": folder / "images"} | more)


def resume(folder: Path, **more) -> None:
    runs.train_here(flags(folder, resume_from_checkpoint="latest", **more))


def test_copied_and_touched_images_are_the_same_and_nothing_is_said_about_rounding(folder, capsys):
    for image in (folder / "images").iterdir():
        os.utime(image)
    resume(folder)
    printed = capsys.readouterr().out
    assert "Resumed from" in printed and "other conditions" not in printed


def replace(images: Path) -> None:
    Image.open(images / PICTURE).rotate(90).save(images / PICTURE)


def write_again(images: Path) -> None:
    Image.open(images / PICTURE).save(images / PICTURE, compress_level=1)


def swap(images: Path) -> None:
    """With another one of its size: no length of a sample changes."""
    (images / PICTURE).rename(images / "kept")
    shutil.copy(images / "wide_rgb.png", images / PICTURE)


@pytest.mark.parametrize("change", [replace, write_again, swap])
def test_an_image_that_was_replaced_before_the_resume_is_named_and_may_be_ignored(change, folder):
    change(folder / "images")
    with pytest.raises(CheckpointError, match=rf"images: 1 of \d+ files looked at have changed, first {PICTURE}: "):
        resume(folder)
    resume(folder, resume_ignore="images")
    assert [entry["step"] for entry in runs.log(folder / "run")] == [1, 2, 3, 4]


def test_an_image_that_is_gone_is_named(folder):
    (folder / "images" / PICTURE).unlink()
    with pytest.raises(CheckpointError, match=rf"first {PICTURE}: [\d,]+ bytes in the checkpoint, not there now"):
        resume(folder, on_bad_sample="skip", resume_ignore="data")


def test_a_state_that_knows_no_images_is_resumed(folder):
    """Of a version before them; its checksum is put right."""
    from mini_llava.training.checkpoint import _manifest_checksum

    file = folder / "run" / "checkpoint-2" / "manifest.json"
    manifest = read_manifest(file.parent)
    del manifest["identity"]["images"], manifest["computed_on"], manifest["sampler"]["empty_steps"]
    file.write_text(json.dumps(manifest | {"sha256": _manifest_checksum(manifest)}))
    replace(folder / "images")
    resume(folder)
    assert len(runs.log(folder / "run")) == 4


def test_another_number_of_threads_is_said_with_both_numbers(folder, capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        resume(folder)
    finally:
        torch.set_num_threads(before)
    said = f"under other conditions: CPU threads {before} then, {before + 1} now. The run goes on, but its numbers may"
    assert said in capsys.readouterr().out
