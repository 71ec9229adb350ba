"""One run owns an output directory: the second is refused and told whose it is, and a killed one blocks nobody."""

import errno
import fcntl
import json
import os
import re
import signal
import socket

import pytest

from mini_llava.guards import ownership
from tests.end_to_end import runs
from tests.forked_runs import start

SETTINGS = {"max_steps": 500, "global_batch_size": 8, "per_device_train_batch_size": 2, "save_steps": 2}


def content(folder) -> dict:
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    folder, resumed = tmp_path / "run", {"resume_from_checkpoint": "latest"}
    first = start(runs.flags_of(2, folder, SETTINGS | {"dataloader_num_workers": 1}), tmp_path / "first.txt")
    first.wait_until(lambda: list(folder.glob("checkpoint-*")))
    pid = json.loads((folder / ownership.NAME).read_text())["pid"]
    os.killpg(first.process.pid, signal.SIGSTOP)  # nobody else writes there
    try:
        before = content(folder)
        for number, values in enumerate(({}, resumed)):
            second = start(runs.flags_of(2, folder, SETTINGS | values), tmp_path / f"second-{number}.txt")
            assert second.wait() == 1
            whose = rf"train\.py: error: {folder} \(--output_dir\) is owned by the run of process {pid} on "
            whose += rf"{socket.gethostname()}, since 20\d\d-.*\. End it, or choose another --output_dir\."
            assert re.fullmatch(whose, second.text.strip().splitlines()[-1]), second.text
        assert content(folder) == before
        runs.plan_here(runs.flags_of(2, folder, SETTINGS))
    finally:
        os.killpg(first.process.pid, signal.SIGKILL)
    first.wait_until_all_have_ended(grace=10)
    third = start(runs.flags_of(2, folder, SETTINGS | resumed), tmp_path / "third.txt")
    third.wait_until(lambda: " Resumed from " in third.text)
    assert json.loads((folder / ownership.NAME).read_text())["pid"] != pid
    third.kill()


def test_a_run_that_has_ended_well_or_with_an_error_owns_nothing_and_leaves_no_trace(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="The learning rate would be 0 in the only step"):
        runs.train_here(runs.flags_of(1, folder, SETTINGS | {"max_steps": 1}))
    assert in_another_process(ownership.own, folder) is None
    runs.train_here(runs.flags_of(1, folder, SETTINGS | {"max_steps": 2}))
    assert in_another_process(ownership.own, folder) is None
    assert not (folder / ownership.NAME).exists()


# --- the lock itself -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_owned():
    yield
    ownership.release()


def in_another_process(function, *arguments) -> str | None:
    """What a forked process says that fails; it releases what it owns."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            function(*arguments)
            ownership.release()
        except OSError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with open(reader) as said:
        return said.read() or None


def test_a_process_does_not_lock_itself_out_and_its_children_do_not_own(tmp_path):
    ownership.own(tmp_path)
    ownership.own(tmp_path)
    assert f"owned by the run of process {os.getpid()} on" in in_another_process(ownership.own, tmp_path)
    assert in_another_process(os.listdir, tmp_path) is None
    assert "owned by" in in_another_process(ownership.own, tmp_path)  # no child's end has given the lock up
    ownership.own(tmp_path / "another")
    assert in_another_process(ownership.own, tmp_path) is None


def test_a_child_that_outlives_its_run_does_not_block_the_next(tmp_path):
    """As a loader worker of a killed run may for a while."""

    def own_and_leave_a_child():
        ownership.own(tmp_path)
        if os.fork() == 0:
            signal.pause()
        os.kill(os.getpid(), signal.SIGKILL)

    if (pid := os.fork()) == 0:
        os.setpgrp()
        own_and_leave_a_child()
    os.waitpid(pid, 0)
    try:
        assert json.loads((tmp_path / ownership.NAME).read_text())["pid"] == pid
        ownership.own(tmp_path)
    finally:
        os.killpg(pid, signal.SIGKILL)


def test_what_a_kill_has_torn_is_no_owner(tmp_path):
    for content in ("", '{"host": "a', "[1]", "null", '{"host": "a"}'):
        (tmp_path / ownership.NAME).write_text(content)
        ownership.own(tmp_path)
        ownership.release()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_without_locks_what_the_file_says_decides(code, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    def left_by(**changed) -> None:
        owner = {"host": socket.gethostname(), "pid": os.getppid(), "since": "2026-01-02 03:04:05+00:00"} | changed
        (tmp_path / ownership.NAME).write_text(json.dumps(owner))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    ownership.own(tmp_path)
    assert f"is owned by the run of process {os.getpid()} on" in in_another_process(ownership.own, tmp_path)
    ownership.release()
    assert in_another_process(ownership.own, tmp_path) is None

    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    left_by(pid=pid)
    ownership.own(tmp_path)
    ownership.release()
    left_by()  # of a process that began later: the number is given anew
    ownership.own(tmp_path)
    ownership.release()

    left_by(host="elsewhere", pid=7)
    with pytest.raises(BlockingIOError) as refused:
        ownership.own(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path} (--output_dir) was last owned by the run of process 7 on elsewhere, since 2026-01-02 "
        "03:04:05+00:00, and this file system has no locks that would tell whether it has ended. If it has, delete "
        f"{tmp_path}/.owner; else choose another --output_dir."
    )
