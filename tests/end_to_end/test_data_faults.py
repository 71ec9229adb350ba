"""Data that fails while a model trains: whatever it is, the work so far is saved before the run ends."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from mini_llava.data.loader import LoaderError, RankSteps
from mini_llava.data_file import DataFileError
from mini_llava.image_files import BadImage
from mini_llava.training.checkpoint import read_manifest
from mini_llava.training.lockstep import DataFault
from tests.end_to_end import runs
from tests.forked_runs import start

pytestmark = pytest.mark.slow

TORN = "wide_rgb.png"
STEPS = 6
SETTINGS = {
    "max_steps": STEPS,
    "save_steps": 100,
    "global_batch_size": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "longest_batch_first": False,
}


@pytest.fixture
def data(tmp_path) -> Path:
    """A copy of the images, one of them torn (which shows when it is opened), and 24 records, the torn image in none
    of the first twelve and in all of the next four."""
    shutil.copytree(runs.FIXTURES / "data" / "images", tmp_path / "images")
    torn = tmp_path / "images" / TORN
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    good = [record for record in runs.RECORDS if isinstance(record.get("image"), str) and record["image"] != TORN]
    records = good[:12] + [record | {"image": TORN} for record in good[12:16]] + good[16:24]
    (tmp_path / "records.json").write_text(json.dumps(records))
    batches = [list(range(first, first + 4)) for first in range(0, 24, 4)]
    (tmp_path / "order.json").write_text(json.dumps(batches))
    return tmp_path


def flags(data: Path, name: str = "run", **more) -> list[str]:
    values = {"data_path": data / "records.json", "image_folder": data / "images", "sample_order": data / "order.json"}
    return runs.flags_of(2, data / name, SETTINGS | values | more)


def saved_steps(run: Path) -> list[int]:
    return sorted(read_manifest(path.parent)["step"] for path in run.glob("checkpoint-*/manifest.json"))


def at_step(monkeypatch, number: int, act) -> None:
    """Has `act()` happen when the data of a step, counted from 1, is asked for."""
    asked, get = [], RankSteps.__getitem__

    def __getitem__(self, micro_batches):
        asked.append(micro_batches)
        if len(asked) == number:
            act()
        return get(self, micro_batches)

    monkeypatch.setattr(RankSteps, "__getitem__", __getitem__)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_record_in_step_4_ends_the_run_with_the_state_of_step_3_which_goes_on_without_it(workers, data):
    with pytest.raises(
        BadImage, match=r"records\.json, record 1[2-5] .*wide_rgb\.png.* Fix it, or leave such records out"
    ):
        runs.train_here(flags(data, dataloader_num_workers=workers))
    assert saved_steps(data / "run") == [3] and not (data / "run" / "model.safetensors").exists()
    more = dict(on_bad_sample="skip", max_skipped_share=0.5, resume_from_checkpoint="latest")
    runs.train_here(flags(data, **more))
    assert [entry["step"] for entry in runs.log(data / "run")] == [1, 2, 3, 5, 6]  # nothing of step 4 could be trained


def test_a_step_without_a_sample_takes_no_optimizer_step_and_none_of_the_schedule(data):
    """Against a run whose order never had that global batch; its cosine is one of six steps, too."""
    runs.train_here(flags(data, on_bad_sample="skip", max_skipped_share=1, save_steps=6))
    batches = json.loads((data / "order.json").read_text())
    (data / "without.json").write_text(json.dumps(batches[:3] + batches[4:] + batches[:1]))
    runs.train_here(flags(data, "without", sample_order=data / "without.json", save_steps=5))
    found, expected = runs.log(data / "run"), runs.log(data / "without")
    assert [entry["step"] for entry in found] == [1, 2, 3, 5, 6]
    same = ("loss", "gradient_norm", "learning_rate")
    assert [[e[key] for key in same] for e in found] == [[e[key] for key in same] for e in expected[:5]]
    state, other = data / "run" / "checkpoint-6", data / "without" / "checkpoint-5"
    assert read_manifest(state)["optimizer_steps"] == 5 and read_manifest(state)["sampler"]["empty_steps"] == 1
    moments, others = runs.first_moments(state), runs.first_moments(other)
    assert all(moments[name].equal(others[name]) for name in others)


def test_when_the_image_folder_is_gone_the_run_saves_and_ends_long_before_its_last_step(data, monkeypatch):
    (data / "order.json").write_text(json.dumps([list(range(4)), list(range(4, 8))]))
    at_step(monkeypatch, 5, lambda: (data / "images").rename(data / "elsewhere"))
    with pytest.raises(DataFault, match="has left out 8 samples within 6 steps, more than --max_skipped_share allows"):
        runs.train_here(flags(data, max_steps=60, on_bad_sample="skip", max_skipped_share=0.1))
    [step] = saved_steps(data / "run")
    assert step == 5 and len(runs.log(data / "run")) == 4, "step 5 had no sample, and step 6 would have had none"
    listed = [json.loads(line) for line in (data / "run" / "skipped.jsonl").read_text().splitlines()]
    assert {entry["index"] for entry in listed} == {0, 1, 2, 3, 4, 5, 6, 7}


def test_a_data_file_that_changes_in_mid_run_costs_no_step(data, monkeypatch):
    def grow():
        with open(data / "records.json", "a") as file:
            file.write("\n")

    at_step(monkeypatch, 4, grow)
    with pytest.raises(DataFileError, match=r"records\.json has changed"):
        runs.train_here(flags(data))
    assert saved_steps(data / "run") == [3]


def test_a_held_out_picture_that_is_deleted_in_mid_run_costs_no_step(data, monkeypatch):
    (data / "held_out").mkdir()
    shutil.copy(data / "images" / "square_rgb.png", data / "held_out" / "seen.png")
    record = {"image": "seen.png", "conversations": runs.HELD_OUT["words"][0]["conversations"]}
    (data / "held_out.json").write_text(json.dumps([record]))
    at_step(monkeypatch, 3, (data / "held_out" / "seen.png").unlink)
    held_out = {"eval_data_path": data / "held_out.json", "eval_image_folder": data / "held_out", "eval_steps": 2}
    with pytest.raises(ValueError, match=r"--eval_data_path: .*held_out\.json, record 0.*seen\.png"):
        runs.train_here(flags(data, **held_out))
    assert saved_steps(data / "run") == [2]


def test_a_loader_worker_that_is_killed_is_a_sentence_and_costs_no_step(data, monkeypatch):
    trainer = os.getpid()
    at_step(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGKILL) if os.getpid() != trainer else None)
    with pytest.raises(LoaderError, match=r"was killed .* while .*records\.json, record \d+ .*out of memory"):
        runs.train_here(flags(data, dataloader_num_workers=1))
    assert saved_steps(data / "run") in ([2], [3])  # what it had ready for step 3 may have died with it


def test_a_loader_worker_that_hangs_is_named_with_its_records_and_costs_no_step(data, monkeypatch):
    at_step(monkeypatch, 4, lambda: time.sleep(600))
    named = (
        r"Worker 0 of the loader \(pid \d+\) has delivered nothing for \d s, .*--dataloader_timeout.* record 1[2-5] "
    )
    with pytest.raises(LoaderError, match=named):
        runs.train_here(flags(data, dataloader_num_workers=1, dataloader_timeout=1))
    assert saved_steps(data / "run") == [3]


def hang_in_step_4() -> None:
    """In the ranks of a run."""
    at_step(pytest.MonkeyPatch(), 4, lambda: time.sleep(600))


def test_a_signal_is_answered_while_a_loader_worker_hangs(data):
    run = start(flags(data, dataloader_num_workers=1), data / "printed.txt", inside=hang_in_step_4)
    log = data / "run" / "log.jsonl"  # the progress line leaves out a step that comes 0.1 s after another
    run.wait_until(lambda: log.exists() and '"step": 2,' in log.read_text())
    asked = time.monotonic()
    [rank] = psutil.Process(run.process.pid).children()
    rank.send_signal(signal.SIGTERM)
    assert run.wait(60) == 128 + signal.SIGTERM, run.text
    assert time.monotonic() - asked < 20 and saved_steps(data / "run") == [3]
    assert json.loads((data / "run" / "preempted").read_text())["step"] == 3


@pytest.mark.parametrize("config", ["cpu", "zero3"], ids=["DDP", "ZeRO-3"])
def test_a_fault_that_one_of_two_ranks_meets_ends_both_with_one_sentence_and_a_state(config, data):
    batches = [list(range(first, first + 4)) for first in (0, 4, 8)] + [[19, 20, 21, 12], [16, 17, 18, 22]]
    (data / "order.json").write_text(json.dumps(batches))
    kept = dict(save_steps=2, save_total_limit=1)
    run = start(flags(data, max_steps=5, packing=False, **kept), data / "printed.txt", config, 2)
    assert run.wait() == 1 and "Traceback" not in run.text, run.text
    errors = [line for line in run.text.splitlines() if "train.py: error" in line]
    assert len(errors) == 1 and "records.json, record 12 " in errors[0], run.text
    assert "on rank 1" in errors[0] or "rank 1: " in errors[0], "the one that removes no old state"
    assert saved_steps(data / "run") == [2, 3], "the state that a fault has ended replaces none, whoever met the fault"
