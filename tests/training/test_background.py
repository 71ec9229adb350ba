"""A state that is written behind the steps is the one that is written while the run stands, and as safe.

Kills in the middle of it are the subject of end_to_end/test_crashes.py, signals of end_to_end/test_preemption.py.
"""

import contextlib
import functools
import multiprocessing
import os
import re
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mini_llava.guards.checkpoints import complete_checkpoints
from mini_llava.options import background
from mini_llava.options.background import BackgroundWriter, free_memory
from mini_llava.training import checkpoint
from tests.end_to_end import runs
from tests.forked_runs import start
from tests.launching import small_disk, train_in_turn

SETTINGS = {"global_batch_size": 8, "per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 1}
MEANWHILE = "The run went on meanwhile."


def contents(output_dir: Path) -> dict[str, bytes]:
    """The files of all states but the manifests, which name their folders."""
    files = [path for path in output_dir.glob("checkpoint-*/*") if path.name != "manifest.json"]
    return {str(path.relative_to(output_dir)): path.read_bytes() for path in files}


@pytest.fixture
def writer() -> BackgroundWriter:
    AcceleratorState._reset_state(reset_partial_state=True)
    return BackgroundWriter(Accelerator(cpu=True))


# --- the same files --------------------------------------------------------------------------------------------------


def test_a_file_has_the_bytes_that_safetensors_writes(tmp_path):
    names = ["b.weight|master|0", "b.weight|exp_avg|12", "ä|master|0", 'a"b|master|0', "A|exp_avg_sq|7"]
    tensors = {name: torch.randn(5 + number) for number, name in enumerate(names)}
    tensors |= {"rng|cpu|0": torch.get_rng_state(), "empty|master|0": torch.empty(0)}
    written = checkpoint.write_safetensors(tmp_path / "file", tensors)
    assert (tmp_path / "file").read_bytes() == safetensors.torch.save(tensors)
    assert checkpoint.digest(tmp_path / "file") == written


def test_one_process_writes_the_same_states_behind_its_steps_as_standing(tmp_path, capsys):
    for behind in (True, False):
        runs.train_here(runs.flags_of(2, tmp_path / str(behind), SETTINGS | {"background_save": behind}))
        said = re.findall(
            rf"checkpoint-(\d) is written: .* GB/s\)\.(?: {MEANWHILE})?", printed := capsys.readouterr().out
        )
        assert said == ["1", "2", "3", "4"]
        assert printed.count(MEANWHILE) == (3 if behind else 0)  # the last has no steps to be written behind
        assert "Each save will stop the run" not in printed
    written = contents(tmp_path / "True")
    assert written == contents(tmp_path / "False")
    assert len({written[f"checkpoint-{step}/state-rank00000-0000.safetensors"] for step in (1, 2, 3, 4)}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3", "zero3_offload"])
def test_two_processes_write_the_same_states_behind_their_steps_as_standing(backend, tmp_path):
    config = None if backend == "ddp" else runs.config_file(backend, tmp_path)
    lines = [
        runs.flags_of(2, tmp_path / str(behind), SETTINGS | {"background_save": behind}) for behind in (True, False)
    ]
    printed = train_in_turn(config, lines, tmp_path)
    assert printed.count("is written: ") == 8 and printed.count(MEANWHILE) == 3
    written = contents(tmp_path / "True")
    assert written == contents(tmp_path / "False")
    assert "checkpoint-4/state-rank00001-0000.safetensors" in written


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_copies_into_pinned_memory_what_the_next_step_overwrites():
    AcceleratorState._reset_state(reset_partial_state=True)
    writer, values = BackgroundWriter(Accelerator()), torch.randn(2**26, device="cuda")
    assert writer.reserve(values.numel()) is None and writer.buffer.is_pinned()
    before = values.cpu()
    [copies] = writer.copied([{"first": values[:7], "others": values[7:]}])
    values.zero_()
    assert torch.equal(torch.cat([copies["first"], copies["others"]]), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_writes_the_same_states_behind_its_steps_as_standing(tmp_path):
    for behind in (True, False):  # kernels that add in any order would end in other bits
        runs.train_here(
            runs.flags_of(2, tmp_path / str(behind), SETTINGS | {"background_save": behind, "packing": False})
        )
    assert contents(tmp_path / "True") == contents(tmp_path / "False")


# --- a write that fails, and an error elsewhere ----------------------------------------------------------------------


def test_a_write_that_fails_behind_the_steps_is_said_while_the_run_goes_on_and_the_next_is_the_next_try(
    tmp_path, capsys
):
    with small_disk(tmp_path / "disk", "4m") as disk:  # a state has 2.3 MB
        in_the_way = disk / "of somebody else"
        in_the_way.write_bytes(bytes(2_500_000))
        flags = runs.flags_of(2, disk, SETTINGS | {"max_steps": 3, "save_steps": 2})
        runs.train_here(flags)
        printed = capsys.readouterr().out
        [warning] = re.findall(r"Warning: .*checkpoint-2 could not be written.*", printed)
        assert "No space left on device" in warning
        assert "The run goes on and the next save tries again" in warning
        assert not complete_checkpoints(disk) and not list(disk.glob(".checkpoint*")) and runs.saved_weights(disk)


def slowly(seconds: float, listing: Path | None = None) -> None:
    """What writes a state waits first; lists when it begins and has ended."""
    write = checkpoint.Begun.write

    def writes(begun, *rest):
        say(f"begins {begun.final.name}\n")
        time.sleep(seconds)
        sentence = write(begun, *rest)
        say(f"has ended {begun.final.name}\n")
        return sentence

    def say(line: str) -> None:
        if listing is not None:
            with open(listing, "a") as file:
                file.write(line)

    checkpoint.Begun.write = writes


def fails_on_the_last_rank_in_step_2_while_state_1_is_written() -> None:
    from mini_llava.training import backend

    slowly(3)
    step, calls = backend.optimizer_step, []

    def optimizer_step(*arguments):
        calls.append(1)
        if len(calls) == 2 and os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
            raise ZeroDivisionError
        return step(*arguments)

    backend.optimizer_step = optimizer_step


@pytest.mark.slow
@pytest.mark.parametrize(("config", "processes"), [(None, 1), ("zero3", 2)], ids=["one process", "ZeRO-3 on two"])
def test_an_error_on_one_rank_waits_for_the_state_that_all_are_writing(config, processes, tmp_path):
    flags = runs.flags_of(2, tmp_path / "run", SETTINGS)
    inside = fails_on_the_last_rank_in_step_2_while_state_1_is_written
    run = start(flags, tmp_path / "printed.txt", config, processes, inside=inside)
    assert run.wait() == 1
    assert "ZeroDivisionError: this rank ends once the last training state is written." in run.text
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["checkpoint-1"], run.text
    resumed = start([*flags, "--resume_from_checkpoint", "latest"], tmp_path / "again.txt", config, processes)
    assert resumed.wait() == 0 and "checkpoint-1 at step 1" in resumed.text, resumed.text


@pytest.mark.slow
def test_a_save_that_falls_due_waits_for_the_state_before_it(tmp_path):
    run = start(
        runs.flags_of(2, tmp_path / "run", SETTINGS | {"save_total_limit": 1}),
        tmp_path / "printed.txt",
        inside=functools.partial(slowly, 3, tmp_path / "listing"),
    )
    assert run.wait() == 0, run.text
    assert re.findall(r"checkpoint-(\d) is written", run.text) == ["1", "2", "3", "4"]
    expected = [f"{what} checkpoint-{step}" for step in (1, 2, 3, 4) for what in ("begins", "has ended")]
    assert (tmp_path / "listing").read_text().splitlines() == expected
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["checkpoint-4"]


# --- memory ----------------------------------------------------------------------------------------------------------


def test_where_memory_does_not_suffice_nothing_is_taken_and_a_sentence_says_so(writer):
    sentence = writer.reserve(free_memory() // 4)  # all of it, of which a quarter must stay free
    assert re.match(
        r"Each save will stop the run until it is written: .* would take [\d.,]+ GB of memory on ", sentence
    )
    assert writer.buffer is None
    assert writer.reserve(1000) is None and writer.buffer.numel() >= 1000


def test_a_run_without_the_memory_says_so_once_and_stands_while_it_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(background, "LEFT_FREE", 1.0)
    runs.train_here(runs.flags_of(2, tmp_path, SETTINGS))
    printed = capsys.readouterr().out
    assert printed.count("Each save will stop the run until it is written: ") == 1
    assert printed.count(" GB/s).") == 4 and MEANWHILE not in printed


@pytest.mark.parametrize("values", [{"save_strategy": "no"}, {"save_steps": 4}, {"background_save": False}], ids=str)
def test_no_memory_is_taken_where_no_state_is_written_behind_a_step(values, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(BackgroundWriter, "reserve", lambda *arguments: taken.append(arguments))
    runs.train_here(runs.flags_of(2, tmp_path, SETTINGS | values))
    assert not taken


def test_a_forked_process_gets_no_copy_of_the_memory(writer):
    assert writer.reserve(1000) is None
    address, size = writer.buffer.data_ptr(), writer.buffer.nbytes
    with open("/proc/self/smaps") as file:
        mappings = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) [\s\S]*?^VmFlags: (.*)$", file.read(), re.MULTILINE)
    [flags] = [
        flags for start, stop, flags in mappings if int(start, 16) <= address and address + size <= int(stop, 16)
    ]
    assert "dc" in flags.split()  # don't copy


@contextlib.contextmanager
def control_group(limit: int):
    """The file to enter a group of processes that may have so many bytes; skipped where none can be made."""
    version_2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    folder = Path("/sys/fs/cgroup", *([] if version_2 else ["memory"]), f"mini_llava-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / ("memory.max" if version_2 else "memory.limit_in_bytes")).write_text(str(limit))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield folder / "cgroup.procs"
    finally:
        folder.rmdir()


def free_memory_in(group: Path, answer) -> None:
    group.write_text("0")  # this process
    answer.send(free_memory())


def test_the_limit_of_a_control_group_counts():
    limit = 600 * 2**20
    forks = multiprocessing.get_context("fork")  # a Python of its own would take seconds to import torch
    answer, sent = forks.Pipe(duplex=False)
    with control_group(limit) as procs:
        process = forks.Process(target=free_memory_in, args=(procs, sent))
        process.start()
        process.join()
    assert process.exitcode == 0 and 0 < answer.recv() < limit


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_of_a_control_group_and_those_above_the_tightest_counts(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    in_which, groups = tmp_path / "proc/self/cgroup", tmp_path / "sys/fs/cgroup"
    stat = "anon 10\nactive_file 3000\ninactive_file 2000\ntotal_active_file 300\ntotal_inactive_file 200\n"
    assert free_memory(tmp_path) > 10**6  # no group
    in_which.write_text("0::/job/step\n")
    group(groups / "job", memory__max="100000\n", memory__current="60000\n", memory__stat=stat)
    group(groups / "job/step", memory__max="max\n", memory__current="60000\n", memory__stat=stat)
    assert free_memory(tmp_path) == 100_000 - 60_000 + 5_000  # files of which there are copies on disks
    in_which.write_text("4:memory:/outside/of/this/container\n3:cpu:/\n")
    group(groups / "memory", memory__limit_in_bytes="70000", memory__usage_in_bytes="69000", memory__stat=stat)
    assert free_memory(tmp_path) == 1_500
