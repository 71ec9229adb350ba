"""When one of three ranks ends, the others end with a sentence that names it; none is given up while it lives.

Real processes over gloo, waiting in a collective as training does, each with a forked child as a loader has.
"""

import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from mini_llava.guards import liveness

RANKS = 3
AT_ONCE = 5  # seconds in which a death must have been noticed; it takes milliseconds, and the machine may be busy

pytestmark = pytest.mark.slow


def member(rank: int, port: int, folder: Path, settings: dict) -> None:
    """One rank: watches the others and does what the test writes into the file of its name."""
    os.dup2(os.open(folder / f"printed{rank}", os.O_CREAT | os.O_WRONLY), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    vars(liveness).update(settings)
    liveness.watch_other_ranks(rank, RANKS)
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    (folder / f"ready{rank}").touch()
    while not (order := folder / f"order{rank}").exists():
        time.sleep(0.02)
    match order.read_text():
        case "wait":  # in a collective that the others never join
            try:
                torch.distributed.recv(torch.empty(1), src=(rank + 1) % RANKS)
            except RuntimeError:
                liveness.wait_for_the_sentence()
                raise
        case "work":
            time.sleep(60)
        case "fail":
            liveness.leave("failed")
            os._exit(1)
        case "finish":
            liveness.leave("finished")
            os._exit(0)


class Group:
    def __init__(self, folder: Path, **settings):
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        self.ranks = [context.Process(target=member, args=(r, port, folder, settings)) for r in range(RANKS)]
        for process in self.ranks:
            process.start()
        deadline = time.monotonic() + 120
        while len(list(folder.glob("ready*"))) < RANKS:
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.02)

    def order(self, rank: int, what: str) -> None:
        (self.folder / "new").write_text(what)
        (self.folder / "new").rename(self.folder / f"order{rank}")

    def codes(self, timeout: float) -> list[int | None]:
        """The exit codes of all ranks once they have ended or the time is over."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0, deadline - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    def printed(self) -> list[str]:
        return [(self.folder / f"printed{rank}").read_text().strip() for rank in range(RANKS)]

    def pid(self, rank: int) -> int:
        return self.ranks[rank].pid


@pytest.fixture
def start(tmp_path):
    groups = []

    def new(**settings) -> Group:
        groups.append(Group(tmp_path, **settings))
        return groups[-1]

    yield new
    for process in groups[0].ranks:
        process.kill()
        process.join()


@pytest.mark.parametrize("victim", range(RANKS))
def test_a_killed_rank_is_named_and_the_others_end_at_once(victim, start):
    group = start()
    others = sorted({*range(RANKS)} - {victim})
    for rank in others:
        group.order(rank, "wait")
    time.sleep(0.2)  # so that they do wait
    os.kill(group.pid(victim), signal.SIGKILL)
    codes = group.codes(AT_ONCE)
    assert [codes[rank] for rank in others] == [1, 1], group.printed()
    first, second = (group.printed()[rank] for rank in others)
    assert f"Rank {victim} (pid {group.pid(victim)} on {socket.gethostname()}) has ended without finishing" in first
    assert first.count("\n") == 0 and "--resume_from_checkpoint latest" in first
    assert second.endswith(f"rank {others[1]} ends because rank {victim} has.")


def test_a_rank_that_ends_with_an_error_of_its_own_ends_the_others_a_little_later(start):
    group = start(OWN_MESSAGE=2)
    for rank, what in enumerate(["work", "fail", "wait"]):
        group.order(rank, what)
    started = time.monotonic()
    assert group.codes(2 + AT_ONCE) == [1, 1, 1]
    assert time.monotonic() - started > 1, "they had no time for the same error"
    assert f"Rank 1 (pid {group.pid(1)} on {socket.gethostname()}) has ended with an error;" in group.printed()[0]


def test_a_stopped_rank_is_not_taken_for_dead_and_a_finished_one_not_either(start):
    """Its keep-alive packets are its kernel's: here they would give up after 3 seconds, and it stands still for 5."""
    group = start(KEEP_ALIVE={"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 2})
    os.kill(group.pid(2), signal.SIGSTOP)
    group.order(1, "finish")
    assert group.codes(5) == [None, 0, None], group.printed()
    os.kill(group.pid(2), signal.SIGCONT)
    group.order(2, "finish")
    time.sleep(1)
    group.order(0, "finish")
    assert group.codes(AT_ONCE) == [0, 0, 0]
    assert group.printed() == ["", "", ""]


def test_strangers_at_the_port_are_not_members(monkeypatch):
    monkeypatch.setattr(liveness, "_connections", {})
    monkeypatch.setattr(liveness, "_me", {"rank": 0, "host": "here"})
    listener = liveness._listen("127.0.0.1", 2)
    accepting = threading.Thread(target=liveness._accept_all, args=(listener, "token", 2))
    accepting.start()
    address = listener.getsockname()
    for greeting in (b"", b"GET / HTTP/1.1\r\n\r\n", b'guess\n{"rank": 1}\n', b"token\nnothing\n"):
        with socket.create_connection(address) as stranger:
            stranger.sendall(greeting)
    with socket.create_connection(address) as member:
        member.sendall(b'token\n{"rank": 1}\n')
        accepting.join(10)
        assert list(liveness._connections.values()) == [{"rank": 1}]
        with pytest.raises(OSError):  # and nobody listens any more
            socket.create_connection(address)
    for connection in liveness._connections:
        connection.close()


def test_a_rank_that_cannot_connect_is_named_and_the_run_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(liveness, "_connections", {})
    monkeypatch.setattr(liveness, "_me", {"rank": 0, "host": "here"})
    monkeypatch.setattr(liveness, "PATIENCE", 0.1)
    liveness._accept_all(liveness._listen("127.0.0.1", 3), "token", 3)
    assert "within 0.1 s: 1, 2. Training goes on" in capsys.readouterr().err
