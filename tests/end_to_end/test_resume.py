"""N steps equal k steps, SIGKILL and N - k steps in a new process, to the last bit.

Every run here is real: train.py in processes of its own, two loader workers, dropout in the language model's attention,
and SIGKILL to all of its processes one step beyond the checkpoint, where they wait for it. Losses and gradient norms
are compared as hex and final weights by their sha256. An epoch of the 48 records is 6 steps. test_two_machines.py
resumes under `accelerate launch`, test_crashes.py after kills at any instant.
"""

import functools
import hashlib
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.forked_runs import ROOT, Run, start

FIXTURES = ROOT / "tests" / "parity" / "fixtures"
RECORDS, STEPS, SAVE_STEPS = 48, 11, 3
KILLED_BEYOND = (3, 6)  # the middle of the first epoch, and its end

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    stage: int
    packing: bool
    config: str | None = None
    processes: int = 1
    lora: bool = False

    def flags(self, language_model: Path, output_dir: Path, **others) -> list[str]:
        """Of a run on the records that lie beside the language model."""
        values = {
            "stage": self.stage,
            "model_name_or_path": language_model,
            "vision_tower": FIXTURES / "clip",
            "data_path": language_model.parent / f"train_stage{self.stage}.json",
            "image_folder": FIXTURES / "data" / "images",
            "packing": self.packing,
            "bf16": False,
            "learning_rate": 1e-3,
            "global_batch_size": 8,
            "per_device_train_batch_size": 2,
            "max_steps": STEPS,
            "save_steps": SAVE_STEPS,
            "save_total_limit": 2,
            "dataloader_num_workers": 2,
            "report_to": "none",
            "output_dir": output_dir,
        }
        if self.lora:
            values |= {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.1, "gradient_checkpointing": True}
        return [text for name, value in (values | others).items() for text in (f"--{name}", str(value))]


# Every stage with either layout, on one process and partitioned on two; and each layout on both.
CASES = {
    "stage1-packed-1rank": Case(1, packing=True),
    "stage2-padded-1rank": Case(2, packing=False),
    "stage1-padded-zero3-2ranks": Case(1, packing=False, config="zero3", processes=2),
    "stage2-packed-zero3-2ranks": Case(2, packing=True, config="zero3", processes=2),
    "lora-packed-1rank": Case(2, packing=True, lora=True),
    "lora-padded-zero3-2ranks": Case(2, packing=False, config="zero3", processes=2, lora=True),
}


@dataclass
class Interrupted:
    """The output directories of an uninterrupted run and of one that was killed and resumed."""

    whole: Path
    killed: Path


def log(output_dir: Path) -> list[dict]:
    file = output_dir / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def as_hex(entry: dict) -> tuple[str, str]:
    return entry["loss"].hex(), entry["gradient_norm"].hex()


def per_step(entry: dict, rate: str) -> int:
    """How many samples or tokens the step had."""
    return round(entry[rate] * entry["seconds_per_step"])


def weights(output_dir: Path) -> dict[str, str]:
    files = sorted([*output_dir.glob("*.safetensors"), *output_dir.glob("*.bin")])
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def checkpoints(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.glob("*checkpoint*"))


def is_beyond(output_dir: Path, step: int):
    complete = output_dir / f"checkpoint-{step}" / "manifest.json"
    return lambda: complete.exists() and log(output_dir)[-1]["step"] > step


def wait_beyond(step: int) -> None:
    """In a rank: once the log has the next step, it waits to be killed."""
    from mini_llava.watch.report import Report

    report = Report.step

    def reports_and_waits(self, number: int, *values) -> None:
        report(self, number, *values)
        if number > step:
            time.sleep(600)

    Report.step = reports_and_waits


def finish(run: Run) -> None:
    assert run.wait() == 0, run.text


def interrupt_and_resume(case: Case, language_model: Path, directory: Path) -> Interrupted:
    whole, killed = directory / "whole", directory / "killed"
    backend = dict(config=case.config, processes=case.processes)
    finish(start(case.flags(language_model, whole), directory / "whole.txt", **backend))
    # `latest` from the beginning, as a job that may be requeued has it: without a checkpoint it starts anew.
    flags = case.flags(language_model, killed, resume_from_checkpoint="latest")
    for step in KILLED_BEYOND:
        inside = functools.partial(wait_beyond, step)
        run = start(flags, directory / f"killed beyond {step}.txt", **backend, inside=inside)
        run.wait_until(is_beyond(killed, step))
        run.kill()
        assert not weights(killed), "the run was over before it was killed"
    finish(start(flags, directory / "last.txt", **backend))
    return Interrupted(whole, killed)


@pytest.fixture(scope="module")
def language_models(tmp_path_factory) -> dict[str, Path]:
    """The golden language model, and the same with dropout; the records of both stages beside them."""
    directory = tmp_path_factory.mktemp("language models")
    for stage in (1, 2):
        records = json.loads((FIXTURES / "data" / f"train_stage{stage}.json").read_text(encoding="utf-8"))
        (directory / f"train_stage{stage}.json").write_text(json.dumps(records[:RECORDS]))
    for name, dropout in (("dropout", 0.1), ("no dropout", 0.0)):
        shutil.copytree(FIXTURES / "llm", directory / name)
        config = json.loads((directory / name / "config.json").read_text())
        (directory / name / "config.json").write_text(json.dumps(config | {"attention_dropout": dropout}))
    return {name: directory / name for name in ("dropout", "no dropout")}


@pytest.fixture(scope="module")
def interrupted(language_models, tmp_path_factory):
    """`interrupted(name)` gives the two runs of a case; all are computed ahead, two at a time."""
    directory = tmp_path_factory.mktemp("resume")
    with ThreadPoolExecutor(2) as pool:
        futures = {
            name: pool.submit(interrupt_and_resume, case, language_models["dropout"], directory / name)
            for name, case in CASES.items()
        }
        yield lambda name: futures[name].result()


@pytest.fixture
def saved(interrupted, tmp_path) -> Path:
    """A copy of an output directory that holds checkpoints."""
    source = interrupted("stage2-padded-1rank").killed
    return Path(shutil.copytree(source, tmp_path / "saved"))


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradient_norms_after_a_kill_are_those_of_an_uninterrupted_run(name, interrupted):
    runs = interrupted(name)
    whole = {entry["step"]: as_hex(entry) for entry in log(runs.whole)}
    assert sorted(whole) == list(range(1, STEPS + 1))
    killed = [(entry["step"], as_hex(entry)) for entry in log(runs.killed)]
    assert killed == sorted(whole.items()), "steps that were done again stand in the log once"


@pytest.mark.parametrize("name", CASES)
def test_final_weights_after_a_kill_are_those_of_an_uninterrupted_run(name, interrupted):
    runs = interrupted(name)
    assert weights(runs.whole), "nothing was saved"
    assert weights(runs.killed) == weights(runs.whole)


@pytest.mark.parametrize("name", CASES)
def test_the_killed_run_went_on_from_its_checkpoints_and_kept_the_newest_two(name, interrupted):
    runs = interrupted(name)
    for name, at_least in zip(("killed beyond 6", "last"), KILLED_BEYOND, strict=True):
        text = (runs.killed.parent / f"{name}.txt").read_text(encoding="utf-8", errors="replace")
        step, again = re.search(r"checkpoint-(\d+) at step \1\.\n(The run had reached step )?", text).groups()
        assert int(step) >= at_least and int(step) % SAVE_STEPS == 0
        assert again, "it was killed beyond its checkpoint, so that steps were lost"
    assert checkpoints(runs.killed) == ["checkpoint-6", "checkpoint-9"]


def test_what_a_kill_during_saving_leaves_behind_is_passed_over(interrupted, saved, language_models, tmp_path):
    (saved / "checkpoint-9" / "manifest.json").unlink()  # written last: without it nothing else counts
    half = saved / ".checkpoint-9.incomplete"
    half.mkdir()
    (half / "state-rank00000-0000.safetensors").write_bytes(b"half")
    case = CASES["stage2-padded-1rank"]
    flags = case.flags(language_models["dropout"], saved, resume_from_checkpoint="latest")
    run = start(flags, tmp_path / "run.txt")
    finish(run)
    assert f"Resumed from {saved / 'checkpoint-6'} at step 6" in run.text
    assert weights(saved) == weights(interrupted("stage2-padded-1rank").whole)
    assert checkpoints(saved) == ["checkpoint-6", "checkpoint-9"] and not half.exists()


# --- another number of processes -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(language_models, tmp_path_factory) -> Path:
    """The output of eight steps of stage 2 under ZeRO-3 on two processes, without dropout, with a checkpoint after 4.

    Without dropout, because a rank draws its masks from a generator of its own: with another number of ranks the
    masks are others.
    """
    case, directory = Case(2, packing=True, config="zero3", processes=2), tmp_path_factory.mktemp("two ranks")
    flags = case.flags(language_models["no dropout"], directory / "run", max_steps=8, save_steps=4)
    finish(start(flags, directory / "run.txt", case.config, case.processes))
    return directory / "run"


@pytest.mark.parametrize("config, processes", [(None, 1), ("cpu", 2)], ids=["one process", "DDP on two"])
def test_a_zero3_checkpoint_of_two_ranks_goes_on_elsewhere(config, processes, two_ranks, language_models, tmp_path):
    case = Case(2, packing=True, config=config, processes=processes)
    checkpoint = two_ranks / "checkpoint-4"
    flags = case.flags(
        language_models["no dropout"], tmp_path / "run", max_steps=8, resume_from_checkpoint=checkpoint, save_steps=8
    )
    finish(run := start(flags, tmp_path / "run.txt", config, processes))
    said = {None: "processes: 2 then, 1 now; backend: DeepSpeed ZeRO-3 then, no distribution now"}
    said |= {"cpu": "(backend: DeepSpeed ZeRO-3 then, DDP now)"}
    assert run.text.count("Resumed, but not to the last bit") == 1 and said[config] in run.text
    before = [entry for entry in log(two_ranks) if entry["step"] > 4]
    after = log(tmp_path / "run")
    assert [entry["step"] for entry in after] == [5, 6, 7, 8]
    for key in ("samples_per_second", "tokens_per_second"):  # the same global batches
        assert [per_step(entry, key) for entry in after] == [per_step(entry, key) for entry in before]
    for key in ("loss", "gradient_norm"):
        # Only the order of fp32 sums differs (rounding 6e-8), and at this learning rate four steps amplify it little.
        assert [entry[key] for entry in after] == pytest.approx([entry[key] for entry in before], rel=1e-5)


def test_dropout_is_on_in_the_runs_above(interrupted, two_ranks):
    with_dropout = log(interrupted("stage2-padded-1rank").whole)
    assert with_dropout[0]["step"] == 1
    # In the first step weights and samples are the same: only dropout tells the losses apart.
    assert with_dropout[0]["loss"] != pytest.approx(log(two_ranks)[0]["loss"], rel=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(language_models, directory: Path, output_dir: Path, case: Case = CASES["stage2-padded-1rank"], **flags):
    """What a run that has to fail prints after its progress: one message, no traceback."""
    run = start(
        case.flags(language_models["dropout"], output_dir, **flags),
        directory / "refused.txt",
        case.config,
        case.processes,
    )
    assert run.wait() != 0, run.text
    assert "Traceback" not in run.text
    _, message = run.text.split("train.py: error")
    return message


@pytest.mark.parametrize("damage", ["missing", "truncated", "one bit"])
def test_a_damaged_checkpoint_is_refused_and_the_file_named(damage, saved, language_models, tmp_path):
    file = next((saved / "checkpoint-9").glob("state-rank*.safetensors"))
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[:-100])
    elif damage == "one bit":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    sentence = refusal(language_models, tmp_path, saved, resume_from_checkpoint=saved / "checkpoint-9")
    assert str(file) in sentence and "older checkpoint" in sentence


def test_two_ranks_refuse_a_damaged_checkpoint_together_and_say_so_once(saved, language_models, tmp_path):
    file = next((saved / "checkpoint-9").glob("state-rank*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    case = Case(2, packing=False, config="cpu", processes=2)
    assert str(file) in refusal(language_models, tmp_path, saved, case, resume_from_checkpoint=saved / "checkpoint-9")


def test_a_directory_that_is_no_checkpoint_is_refused(language_models, tmp_path):
    sentence = refusal(language_models, tmp_path, tmp_path / "new", resume_from_checkpoint=tmp_path)
    assert str(tmp_path) in sentence and "manifest.json" in sentence


def test_checkpoints_of_an_earlier_run_are_not_mixed_with_a_new_one(saved, language_models, tmp_path):
    sentence = refusal(language_models, tmp_path, saved)
    assert "checkpoint-9" in sentence and "--resume_from_checkpoint latest" in sentence and "--output_dir" in sentence
    assert checkpoints(saved) == ["checkpoint-6", "checkpoint-9"]


def test_a_checkpoint_of_other_trained_parameters_is_refused(saved, language_models, tmp_path):
    flags = dict(resume_from_checkpoint=saved / "checkpoint-6", freeze_backbone=True, resume_ignore="freeze_backbone")
    sentence = refusal(language_models, tmp_path, tmp_path / "new", **flags)
    assert "checkpoint-6" in sentence and "language_model." in sentence and "not trained now" in sentence


def test_a_checkpoint_of_another_order_is_refused(saved, language_models, tmp_path):
    flags = dict(resume_from_checkpoint=saved / "checkpoint-6", seed=7, global_batch_size=16)
    sentence = refusal(language_models, tmp_path, tmp_path / "new", **flags)
    assert "--seed: 42 in the checkpoint, 7 now" in sentence
    assert "--global_batch_size, --gradient_accumulation_steps: 8 in the checkpoint, 16 now" in sentence
