"""Full disks, read-only folders, torn and foreign checkpoints: always a sentence, never a half-loaded state.

What a kill leaves behind is the subject of end_to_end/test_resume.py.
"""

import errno
import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn

from mini_llava import arguments as flags
from mini_llava.guards import ownership
from mini_llava.guards.checkpoints import complete_checkpoints, remove_oldest
from mini_llava.guards.output_folder import writing_the_result
from mini_llava.guards.resume import find_checkpoint, verify
from mini_llava.training.checkpoint import CheckpointError, save_checkpoint
from mini_llava.training.sharded_state import ShardedState
from tests.end_to_end import runs
from tests.launching import small_disk, train_in_turn

FOUR_STEPS = {"global_batch_size": 8, "per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2}
# A state of this model is 2.3 MB and the result 1.0 MB: there is room for one state and the result, not for two states.
ROOM_FOR_ONE_STATE = "4m"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The output of a run of stage 2, with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    runs.train_here(runs.flags_of(2, folder, FOUR_STEPS))
    return folder


@pytest.fixture
def saved(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "saved"))


@pytest.fixture
def accelerator() -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True)


@pytest.fixture
def save(accelerator):
    """`save(folder, step)` writes a checkpoint of a small model after one step."""
    model = nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    model(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    state = ShardedState(accelerator, model, optimizer)
    return lambda folder, step: save_checkpoint(state, folder, step, {}, check_owner=ownership.check_still_owned)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".checkpoint*"))


# --- a save that fails -----------------------------------------------------------------------------------------------


def test_on_a_full_disk_the_save_fails_with_a_sentence_leaves_nothing_and_works_again_when_there_is_room(
    accelerator, save, tmp_path
):
    with small_disk(tmp_path / "disk", "3m") as disk:  # a state is 1.1 MB
        save(disk, 1)
        (disk / "ballast").write_bytes(bytes(1_500_000))
        with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written: .*No space left on device"):
            save(disk, 2)
        assert complete_checkpoints(disk) == [disk / "checkpoint-1"] and not hidden(disk)
        verify(accelerator, disk / "checkpoint-1")
        (disk / "ballast").unlink()
        save(disk, 3)
        verify(accelerator, disk / "checkpoint-3")


def test_where_nothing_may_be_written_the_save_fails_with_a_sentence(accelerator, save, tmp_path):
    with small_disk(tmp_path / "disk", "3m") as disk:
        save(disk, 1)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written: .*Read-only file system"):
            save(disk, 2)
        verify(accelerator, disk / "checkpoint-1")
        run = runs.flags_of(2, disk, FOUR_STEPS)
        with pytest.raises(OSError) as refused:
            runs.train_here([*run, "--resume_from_checkpoint", "latest"])
        assert f"{disk} (--output_dir) cannot be written: " in str(refused.value)


def test_one_process_trains_to_its_end_on_a_disk_with_room_for_one_state(tmp_path, capsys):
    with small_disk(tmp_path / "disk", ROOM_FOR_ONE_STATE) as disk:
        runs.train_here(runs.flags_of(2, disk, FOUR_STEPS))
        printed = capsys.readouterr().out
        assert re.search(r"has 0.00\d GB free, and this run needs 0.00\d GB: 2 training states of 0.002 GB", printed)
        assert re.search(r"checkpoint-2 is written: 0.002 GB in \d+\.\d s", printed)
        [warning] = re.findall(r"Warning: .*checkpoint-4 could not be written.*", printed)
        assert "No space left on device" in warning
        assert "The run goes on and the next save tries again" in warning
        assert "a crash before that loses the work since checkpoint-2." in warning
        assert [path.name for path in complete_checkpoints(disk)] == ["checkpoint-2"] and not hidden(disk)
        assert runs.saved_weights(disk)
        entries = runs.log(disk)
        assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
        assert entries[2]["save_seconds"] > 0 and not any("save_seconds" in entries[i] for i in (0, 1, 3))


def test_a_disk_that_is_full_at_the_end_costs_the_result_only(tmp_path):
    with small_disk(tmp_path / "disk", ROOM_FOR_ONE_STATE) as disk:
        run = runs.flags_of(2, disk, FOUR_STEPS | {"save_steps": 3, "resume_from_checkpoint": "latest"})
        filler = disk / "of somebody else"
        filler.write_bytes(bytes(900_000))
        with pytest.raises(OSError, match=r"The result could not be written to .*space.*goes on from checkpoint-3\."):
            runs.train_here(run)
        assert [path.name for path in complete_checkpoints(disk)] == ["checkpoint-3"]
        filler.unlink()
        runs.train_here(run)
        whole = runs.flags_of(2, tmp_path / "whole", FOUR_STEPS)
        runs.train_here(whole)
        for name, tensor in runs.saved_weights(tmp_path / "whole").items():
            assert torch.equal(runs.saved_weights(disk)[name], tensor)


@pytest.mark.slow
def test_two_zero3_processes_go_on_when_one_of_them_or_both_cannot_write(trained, tmp_path):
    (tmp_path / "config").mkdir()
    config = runs.config_file("zero3", tmp_path / "config")
    # Sizes are fixed so that the state of rank 1 (1.2 MB) does not fit and nothing else that it writes is concerned.
    one_rank = runs.flags_of(2, tmp_path / "one rank", FOUR_STEPS)
    with small_disk(tmp_path / "disk", ROOM_FOR_ONE_STATE) as disk:
        both = runs.flags_of(2, disk, FOUR_STEPS)
        elsewhere = runs.flags_of(2, tmp_path / "on", FOUR_STEPS | {"resume_from_checkpoint": disk / "checkpoint-2"})
        printed = train_in_turn(config, [one_rank, both, elsewhere], tmp_path, largest_file={0: 500_000})
        for step in (2, 4):
            sentence = rf"Warning: .*one rank/checkpoint-{step} could not be written: rank 1: .*File too large"
            assert len(re.findall(sentence, printed)) == 1, printed
        assert not list((tmp_path / "one rank").glob("*checkpoint*"))
        assert re.search(r"Warning: .*disk/checkpoint-4 could not be written: .*No space left", printed), printed
        assert [path.name for path in complete_checkpoints(disk)] == ["checkpoint-2"] and not hidden(disk)
        weights = runs.saved_weights(tmp_path / "one rank")
        for name, tensor in runs.saved_weights(disk).items():
            assert torch.equal(tensor, weights[name]), name
    for name, tensor in runs.saved_weights(tmp_path / "on").items():
        assert torch.equal(tensor, weights[name]), name


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning_and_no_failed_save(accelerator, save, tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".checkpoint-1.removed").write_text("in the way")
    save(tmp_path, 2)
    [warning] = remove_oldest(tmp_path, 2, keep=1)
    assert "checkpoint-1 could not be removed" in warning
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"]
    (tmp_path / ".checkpoint-1.removed").unlink()
    save(tmp_path, 3)
    assert remove_oldest(tmp_path, 3, keep=1) == []
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoint-3"] and not hidden(tmp_path)


def test_a_checkpoint_of_the_same_step_is_replaced(accelerator, save, tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "foreign").touch()
    save(tmp_path, 1)
    verify(accelerator, tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1" / "foreign").exists() and not hidden(tmp_path)


# --- what this program did not write ---------------------------------------------------------------------------------


def of_llava(folder: Path, step: int) -> Path:
    """A training state as transformers' Trainer lays it out, which LLaVA's is."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / f"global_step{step}").mkdir(parents=True)
    for name in ("trainer_state.json", "model.safetensors", f"global_step{step}/zero_pp_rank_0_mp_rank_00.pt"):
        (checkpoint / name).write_text(f"of LLaVA, {step}")
    return checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_program_is_named_before_step_1(saved, tmp_path):
    for folder, values in ((tmp_path / "new", {}), (saved, {"resume_from_checkpoint": "latest"})):
        of_llava(folder, 6)
        before = contents(folder)
        with pytest.raises(FileExistsError) as refused:
            runs.train_here(runs.flags_of(2, folder, FOUR_STEPS | values))
        assert str(refused.value) == (
            f"{folder} (--output_dir) holds checkpoint-6, which no run of this program wrote and this one would "
            "overwrite. Move it away, or choose another --output_dir."
        )
        assert contents(folder) == before


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (["log.jsonl"], "log.jsonl"),
        (["arguments.yaml"], "arguments.yaml"),
        (["config.json", "mm_projector.bin", "tokenizer.model", "model-00001-of-00002.safetensors"], "and 1 more"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter_config.json, adapter_model.safetensors, which"),
        ([".unfinished/notes"], ".unfinished"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_no_file_of_another_program_is_replaced(names, listed, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"model_type": "llava"}')
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=re.escape(listed)):
        runs.train_here(runs.flags_of(1, tmp_path, FOUR_STEPS))
    assert contents(tmp_path) == before


def test_files_that_no_run_would_replace_may_be_there_and_stay(tmp_path):
    for name in ("notes.txt", "trainer_state.json", ".checkpoint-best.removed/weights", ".seen-by-all-of-us"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("of somebody else")
    before = contents(tmp_path)
    runs.train_here(runs.flags_of(1, tmp_path, FOUR_STEPS))
    assert before.items() <= contents(tmp_path).items()


def test_what_a_run_left_behind_before_its_first_step_blocks_no_other(tmp_path):
    for name in (
        "cache/lengths",
        "preempted",
        ".owner",
        f".seen-by-all-{'0' * 32}",
        f".arguments.yaml.{'0' * 32}.incomplete",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / f".seen-by-all-{'0' * 32}-1.incomplete").mkdir()
    for _ in range(2):
        runs.train_here(runs.flags_of(1, tmp_path, FOUR_STEPS | {"save_strategy": "no"}))
        assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "flags_of_saving, steps",
    [({"save_strategy": "epoch"}, [2, 4]), ({"save_steps": 0.7}, [3]), ({"save_steps": 0.01}, [1, 2, 3, 4])],
)
def test_states_are_due_after_epochs_and_shares_of_the_run_as_in_transformers(flags_of_saving, steps, tmp_path):
    records = json.loads((runs.FIXTURES / "data" / "train_stage2.json").read_text(encoding="utf-8"))[:7]
    (tmp_path / "records.json").write_text(json.dumps(records), encoding="utf-8")
    values = {"data_path": tmp_path / "records.json", "global_batch_size": 4, "num_train_epochs": 2, "max_steps": -1}
    runs.train_here(runs.flags_of(1, tmp_path / "run", values | {"version": "v1", "save_steps": 4} | flags_of_saving))
    assert [int(path.name.split("-")[1]) for path in complete_checkpoints(tmp_path / "run")] == steps


def test_one_that_appears_in_mid_run_stays_and_the_save_fails(accelerator, save, tmp_path):
    save(tmp_path, 1)
    there = of_llava(tmp_path, 2)
    before = contents(there)
    with pytest.raises(CheckpointError) as failed:
        save(tmp_path, 2)
    assert str(failed.value) == (
        f"{there} could not be written: {there} exists, and this program did not write it. Move it away."
    )
    assert contents(there) == before and not hidden(tmp_path)
    save(tmp_path, 3)
    verify(accelerator, tmp_path / "checkpoint-3")


def test_a_run_whose_folder_was_taken_by_another_machine_saves_nothing_more(save, tmp_path):
    """As where the locks of a file system hold on one machine only."""
    with ownership.released_at_the_end():
        ownership.own(tmp_path)
        save(tmp_path, 1)
        other = ownership.Owner("elsewhere", 7, "2026-01-02 03:04:05+00:00")
        with open(ownership._held.descriptor, "r+", closefd=False) as file:  # closing it would lose the lock
            file.truncate(0)
            file.write(json.dumps(other._asdict()))
        sentence = r"checkpoint-2 could not be written: .* is owned by the run of process 7 on elsewhere, since 2026-01"
        with pytest.raises(CheckpointError, match=sentence):
            save(tmp_path, 2)
        sentence = r"The result could not be written .* is owned by the run of process 7"
        with pytest.raises(OSError, match=sentence), writing_the_result(tmp_path):
            pytest.fail("the result was written")
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert json.loads((tmp_path / ownership.NAME).read_text())["host"] == "elsewhere"


def test_the_removal_of_old_checkpoints_spares_those_of_others(save, tmp_path):
    there = of_llava(tmp_path, 1)
    (there / "manifest.json").write_text('{"kind": "photographs"}')
    for step in (2, 3, 4):
        save(tmp_path, step)
        remove_oldest(tmp_path, step, keep=1)
    assert complete_checkpoints(tmp_path) == [there, tmp_path / "checkpoint-4"]
    assert (there / "model.safetensors").read_text() == "of LLaVA, 1"


# --- torn and foreign checkpoints ------------------------------------------------------------------------------------


def damages(content: bytes):
    """Every kind of damage, with a name; None = the file is missing."""
    yield "missing", None
    yield "empty", b""
    yield "cut in half", content[: len(content) // 2]
    yield "without its last byte", content[:-1]
    yield "longer", content + b"\0"
    for position in range(0, len(content), max(1, len(content) // 20)):
        flipped = bytes([content[position] ^ 0b100])
        yield f"bit {position}", content[:position] + flipped + content[position + 1 :]


def test_damage_to_any_file_is_named_and_the_checkpoint_before_it_is_taken(accelerator, saved):
    files = sorted(path for path in (saved / "checkpoint-4").iterdir())
    assert {file.name for file in files} >= {"manifest.json", "mm_projector.bin", "state-rank00000-0000.safetensors"}
    for file in files:
        content = file.read_bytes()
        for damage, damaged in damages(content):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            said = []
            assert find_checkpoint(accelerator, saved, "latest", said.append) == saved / "checkpoint-2", (file, damage)
            [line] = said
            assert line.startswith(f"Passed over: {saved / 'checkpoint-4'} is torn: ") and file.name in line, line
            with pytest.raises(CheckpointError, match=re.escape(file.name)):
                find_checkpoint(accelerator, saved, str(saved / "checkpoint-4"), print)
            file.write_bytes(content)
    assert find_checkpoint(accelerator, saved, "latest", print) == saved / "checkpoint-4"


@pytest.mark.parametrize(
    "content, sentence",
    [
        ('{"global_step": 4}', "does not describe a training state of this program"),
        ("[1, 2]", "does not describe a training state of this program"),
        ('{"kind": "training state", "format": 1, "files": {}}', "is of format 1, and this program reads 2"),
        ('{"kind": "training state", "format": 2}', "has been altered"),
        ("weights", "is not readable"),
    ],
)
def test_a_foreign_manifest_is_refused(content, sentence, accelerator, saved):
    (saved / "checkpoint-4" / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=sentence):
        find_checkpoint(accelerator, saved, str(saved / "checkpoint-4"), print)


def test_if_no_checkpoint_is_whole_the_run_does_not_start_anew_in_silence(accelerator, saved):
    for name in ("checkpoint-2", "checkpoint-4"):
        (saved / name / "manifest.json").unlink()
    said = []
    with pytest.raises(CheckpointError, match=r"None of the 2 checkpoints .* is whole"):
        find_checkpoint(accelerator, saved, "latest", said.append)
    for step, line in zip((4, 2), said, strict=True):
        assert f"checkpoint-{step} is torn" in line and "no manifest.json" in line
    shutil.rmtree(saved / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"The only checkpoint in .* is not whole; .* Move it away"):
        find_checkpoint(accelerator, saved, "latest", print)


def test_going_back_is_refused_while_newer_checkpoints_would_be_taken_for_the_runs_own(accelerator, saved, tmp_path):
    with pytest.raises(CheckpointError, match=r"also holds checkpoint-4.*Move it away"):
        find_checkpoint(accelerator, saved, str(saved / "checkpoint-2"), print)
    assert find_checkpoint(accelerator, tmp_path / "new", str(saved / "checkpoint-2"), print) == saved / "checkpoint-2"


def test_what_a_killed_save_left_behind_is_named_and_removed_by_the_next_run(saved, capsys):
    shutil.copytree(saved / "checkpoint-2", saved / ".checkpoint-2.removed")
    (saved / ".checkpoint-6.incomplete").mkdir()
    runs.train_here(runs.flags_of(2, saved, FOUR_STEPS | {"resume_from_checkpoint": "latest"}))
    printed = capsys.readouterr().out
    for name in (".checkpoint-2.removed", ".checkpoint-6.incomplete"):
        assert printed.count(f"{saved / name}, left behind by a run that was killed while it saved, is removed.") == 1
    assert not hidden(saved)


# --- another run than the one that saved -----------------------------------------------------------------------------


def resume(saved: Path, output_dir: Path, **changes) -> None:
    values = FOUR_STEPS | {"resume_from_checkpoint": saved / "checkpoint-2"} | changes
    runs.train_here(runs.flags_of(2, output_dir, values))


def refused_lines(saved: Path, output_dir: Path, **changes) -> list[str]:
    """The differences that the refusal lists, and the advice under them."""
    with pytest.raises(CheckpointError) as refused:
        resume(saved, output_dir, **changes)
    return [line.strip() for line in str(refused.value).splitlines()[1:]]


def test_every_difference_is_listed_in_a_line_of_its_own(trained, tmp_path):
    changes = dict(learning_rate=1e-5, max_steps=6, bf16=True, model_max_length=1024)
    assert refused_lines(trained, tmp_path, **changes) == [
        "--model_max_length: 2048 in the checkpoint, 1024 now",
        "--max_steps, --num_train_epochs: 4 in the checkpoint, 6 now",
        "--learning_rate: 2e-05 in the checkpoint, 1e-05 now",
        "--bf16, --fp16: fp32 in the checkpoint, bf16 now",
        "Make them equal, or let them differ: --resume_ignore model_max_length max_steps learning_rate bf16",
    ]


def test_what_does_not_decide_the_numbers_may_differ(trained, tmp_path):
    """Other cutting of the batch, and data and models that were moved: the weights are the same but for rounding."""
    data, tower, images = tmp_path / "moved.json", tmp_path / "moved tower", tmp_path / "moved images"
    shutil.copy(runs.FIXTURES / "data" / "train_stage2.json", data)
    shutil.copytree(runs.FIXTURES / "clip", tower)
    shutil.copytree(runs.FIXTURES / "data" / "images", images, copy_function=shutil.copyfile)  # with times of now
    changes = dict(data_path=data, vision_tower=tower, per_device_train_batch_size=4, packing=False, save_steps=1)
    changes |= dict(image_folder=images)
    resume(trained, tmp_path / "run", **changes)
    expected = runs.saved_weights(trained)
    for name, tensor in runs.saved_weights(tmp_path / "run").items():
        # AdamW divides by the root of the second moment: where a gradient is next to nothing its rounding may move a
        # weight by as much as a step, 2e-5.
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=4e-5)


def test_data_and_model_are_compared_by_content(trained, tmp_path):
    records = json.loads((runs.FIXTURES / "data" / "train_stage2.json").read_text())
    records[0]["conversations"][1]["value"] += "!"
    data, tower, language_model = tmp_path / "data.json", tmp_path / "tower", tmp_path / "llm"
    data.write_text(json.dumps(records))
    shutil.copytree(runs.FIXTURES / "clip", tower)
    weights = load_file(tower / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.mlp.fc1.bias"))
    weights[name][3] = weights[name][3].nextafter(torch.tensor(9.0))  # the smallest possible change
    save_file(weights, tower / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(runs.FIXTURES / "llm", language_model)
    settings = json.loads((language_model / "config.json").read_text())
    (language_model / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.5}))
    changes = dict(data_path=data, vision_tower=tower, model_name_or_path=language_model)
    assert refused_lines(trained, tmp_path / "run", **changes) == [
        "data: file data.json has changed (was train_stage2.json)",
        "model: attention_dropout of the language model is 0.0 in the checkpoint, 0.5 now",
        "model: the weights of the frozen vision_tower are different",
        "Make them equal, or let them differ: --resume_ignore data model",
    ]


def test_pictures_that_were_replaced_or_lost_are_listed_and_may_be_ignored(trained, tmp_path, capsys):
    images = Path(shutil.copytree(runs.FIXTURES / "data" / "images", tmp_path / "images"))
    with_image = [record["image"] for record in runs.RECORDS if "image" in record]
    pictures = list(dict.fromkeys(with_image))
    replaced, other, lost = pictures[1:4]
    size = (images / replaced).stat().st_size
    shutil.copyfile(images / pictures[0], images / replaced)
    content = (images / other).read_bytes()
    (images / other).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    (images / lost).unlink()
    # The length pass finds the lost one only if there is no cache of an earlier one.
    shutil.copytree(trained / "cache", tmp_path / "run" / "cache")
    [changed, gone, advice] = refused_lines(trained, tmp_path / "run", image_folder=images)
    assert changed.startswith(f"images: 2 of {len(pictures)} compared have changed, first '")
    first = changed.split("'")[1]
    now = (images / replaced).stat().st_size
    ends = {replaced: f"({size:,} bytes in the checkpoint, {now:,} now)", other: "(of the same size)"}
    assert changed.endswith(ends[first])
    assert gone == f"images: 1 of {len(pictures)} compared cannot be read now, first '{lost}'"
    assert advice == "Make them equal, or let them differ: --resume_ignore images"
    shutil.copyfile(runs.FIXTURES / "data" / "images" / lost, images / lost)
    resume(trained, tmp_path / "run", image_folder=images, resume_ignore="images")
    assert [entry["step"] for entry in runs.log(tmp_path / "run")] == [3, 4]
    assert "not to the last bit" not in capsys.readouterr().out  # nothing else differs


@pytest.mark.slow
def test_what_a_resumed_run_computes_in_another_way_is_said_and_not_refused(trained, tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        resume(trained, tmp_path, packing=False)
    finally:
        torch.set_num_threads(threads)
    assert (
        f"Resumed, but not to the last bit, because it is computed differently (CPU threads: {threads} then, "
        f"{threads + 1} now; --packing: True then, False now): the numbers may differ from an uninterrupted run's by "
        "rounding.\n"
    ) in capsys.readouterr().out


def test_what_is_named_in_resume_ignore_may_differ(trained, tmp_path):
    values = FOUR_STEPS | {"resume_from_checkpoint": trained / "checkpoint-2", "learning_rate": 0, "seed": 7}
    values |= {"allow": "learning_rate"}
    [line, _] = refused_lines(trained, tmp_path, learning_rate=0, allow="learning_rate", seed=7, resume_ignore="seed")
    assert line.startswith("--learning_rate: ")
    command_line = [*runs.flags_of(2, tmp_path, values), "--resume_ignore", "learning_rate", "seed"]
    runs.train_here(command_line)
    assert [entry["step"] for entry in runs.log(tmp_path)] == [3, 4]


def test_an_unknown_name_in_resume_ignore_is_an_error_that_lists_the_known_ones():
    known = {"model_name_or_path": str(runs.FIXTURES / "llm"), "vision_tower": str(runs.FIXTURES / "clip")}
    for name in ("learning_rat", "save_steps"):
        with pytest.raises(ValueError, match=rf"--resume_ignore {name}: .*data.*learning_rate.*model.*seed"):
            flags.resolve(2, {**known, "data_path": ["x.json"], "resume_ignore": [name]})


# --- file systems that lack something --------------------------------------------------------------------------------


def without(monkeypatch, name: str, code: int, of=lambda *_: True) -> list:
    """`os.NAME` fails as where a file system does not have it; the calls that failed."""
    real, failed = getattr(os, name), []

    def lacking(*arguments):
        if not of(*arguments):
            return real(*arguments)
        failed.append(arguments)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, lacking)
    return failed


def is_directory(path_or_descriptor, *_) -> bool:
    return stat.S_ISDIR(os.stat(path_or_descriptor).st_mode)


def test_where_no_directory_can_be_renamed_the_run_does_not_start(tmp_path, monkeypatch):
    without(monkeypatch, "rename", errno.EXDEV, of=is_directory)
    with pytest.raises(CheckpointError) as refused:
        runs.train_here(runs.flags_of(2, tmp_path, FOUR_STEPS))
    assert re.search(
        r"\(--output_dir\) cannot hold what this run will save; choose another: "
        r"the directory \S+ cannot be renamed: Invalid cross-device link\.",
        str(refused.value),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    "code, of",
    [(errno.EINVAL, is_directory), (errno.ENOTSUP, lambda *_: True), (errno.ENOSYS, lambda *_: True)],
    ids=["EINVAL of directories", "ENOTSUP", "ENOSYS"],
)
def test_where_nothing_is_flushed_the_run_says_so_once_and_saves(code, of, accelerator, tmp_path, monkeypatch, capsys):
    failed = without(monkeypatch, "fsync", code, of)
    stage = 1 if code == errno.ENOSYS else 2
    runs.train_here(runs.flags_of(stage, tmp_path, FOUR_STEPS))
    printed = capsys.readouterr().out
    sentence = f"Warning: {tmp_path} is on a file system that does not flush files and directories when asked to "
    assert printed.count(f"{sentence}({os.strerror(code)}). The run goes on") == 1
    assert len(failed) > 4 and "could not be written" not in printed
    for step in (2, 4):
        verify(accelerator, tmp_path / f"checkpoint-{step}")
    assert runs.saved_weights(tmp_path)


def test_a_flush_that_fails_for_another_reason_is_a_failed_save(save, tmp_path, monkeypatch):
    without(monkeypatch, "fsync", errno.EIO)
    with pytest.raises(CheckpointError, match=r"checkpoint-1 could not be written: .*Input/output error"):
        save(tmp_path, 1)
    assert not list(tmp_path.glob("*checkpoint*"))
