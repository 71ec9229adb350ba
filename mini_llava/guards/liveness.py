"""When a rank dies, end the others with a sentence that names it, instead of leaving them in a collective.

Every rank has one TCP connection to rank 0, on which nothing is sent until a rank ends. The kernel closes the
connections of a killed process at once, and keep-alive packets detect a lost machine. There are no heartbeats: a busy
or stopped process is not dead. The state is the module's, since a process has one process group.
"""

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable

import torch

from .output_streams import flush_before_the_end, say_before_the_end

PATIENCE = 30  # seconds within which all ranks reach rank 0
KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # seconds, seconds, times: a minute in all
OWN_MESSAGE = 6  # seconds for a rank to end with its own error: mostly all ranks have the same one

ENDINGS = {
    "killed": "has ended without finishing",
    "lost": "cannot be reached any more (its machine or the network is down)",
    "failed": "has ended with an error",
}

_connections: dict[socket.socket, dict] = {}  # to rank 0, on rank 0 to all others: who is at the other end
_me: dict = {}
_has_no_sentence = threading.Event()  # this process is about to end with an unexplained error


def watch_other_ranks(rank: int, world_size: int, exit_code: Callable[[], int] = lambda: 1) -> None:
    """Connect this rank and watch the others in a thread. A collective; the process group must exist.

    If another rank ends without `leave`, this process names it and ends with `exit_code`: at once after a crash or
    SIGKILL, at most `OWN_MESSAGE` seconds after an error, a minute after a machine is lost. A rank that cannot connect
    is named and not watched. LLaVA has nothing like it; gloo notices a closed connection, NCCL waits ten minutes.
    """
    if world_size == 1:
        return
    _me.update(rank=rank, local_rank=int(os.environ.get("LOCAL_RANK", 0)), pid=os.getpid(), host=socket.gethostname())
    address = os.environ["MASTER_ADDR"]  # of rank 0's machine; the process group has reached it
    listener = _listen(address, world_size) if rank == 0 else None
    # Only ranks know the token: a stranger that connects and leaves is not a dead rank.
    invitation = [listener.getsockname()[1], secrets.token_hex()] if rank == 0 else [None, None]
    torch.distributed.broadcast_object_list(invitation, src=0)
    port, token = invitation
    if rank == 0:
        _accept_all(listener, token, world_size)
    else:
        # Rank 0 names the ranks that fail here.
        with contextlib.suppress(OSError, ValueError):
            connection = socket.create_connection((address, port), timeout=PATIENCE)
            connection.sendall(f"{token}\n{json.dumps(_me)}\n".encode())
            _watch_connection(connection, json.loads(_read_line(connection)))
    threading.Thread(target=_watch, args=(exit_code,), name="liveness", daemon=True).start()


def leave(ending: str) -> None:
    """Tell the others that this process ends, `finished` or `failed`, and stop watching them."""
    connections = list(_connections)
    _connections.clear()
    for connection in connections:
        with contextlib.suppress(OSError):  # it has ended before
            _send(connection, {"ending": ending, **_me})


def wait_for_the_sentence() -> None:
    """Wait a moment for the end of another rank, which mostly is why a collective has failed here."""
    if _connections:
        _has_no_sentence.set()
        time.sleep(2)


def _listen(address: str, world_size: int) -> socket.socket:
    family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    return socket.create_server(("", 0), family=family, backlog=world_size, dualstack_ipv6=both)


def _accept_all(listener: socket.socket, token: str, world_size: int) -> None:
    """Wait, on rank 0, until every rank has sent who it is; then stop listening."""
    port, deadline = listener.getsockname()[1], time.monotonic() + PATIENCE
    while len(_connections) < world_size - 1 and (left := deadline - time.monotonic()) > 0:
        listener.settimeout(left)
        with contextlib.suppress(OSError, ValueError):
            connection, _ = listener.accept()
            connection.settimeout(5)
            if hmac.compare_digest(_read_line(connection), token.encode()):
                member = json.loads(_read_line(connection))
                _send(connection, _me)
                _watch_connection(connection, member)
    listener.close()
    if missing := set(range(1, world_size)) - {member["rank"] for member in _connections.values()}:
        names = ", ".join(map(str, sorted(missing)))
        print(
            f"Ranks that did not reach {_me['host']}, port {port}, within {PATIENCE} s: {names}. Training goes on, but "
            "if one of them dies, the others will notice only when a collective times out; check the firewall.",
            file=sys.stderr,
        )


def _watch_connection(connection: socket.socket, member: dict) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    _connections[connection] = member


def _watch(exit_code: Callable[[], int]) -> None:
    """Wait, in a thread, for notices and closed connections."""
    selector = selectors.PollSelector()
    for connection, member in _connections.items():
        selector.register(connection, selectors.EVENT_READ, member)
    while selector.get_map():
        for key, _ in selector.select():
            notice = _next_notice(key.fileobj, key.data)
            if notice["ending"] != "finished":
                if _me["rank"] == 0:  # the others are connected to this rank only
                    for connection in list(_connections):
                        with contextlib.suppress(OSError):
                            _send(connection, notice)
                _end_with(notice, exit_code)
            selector.unregister(key.fileobj)
            _connections.pop(key.fileobj, None)


def _next_notice(connection: socket.socket, member: dict) -> dict:
    try:
        line = _read_line(connection)
    except TimeoutError:
        return {"ending": "lost", **member}
    except OSError:
        line = b""
    return json.loads(line) if line else {"ending": "killed", **member}


def _end_with(notice: dict, exit_code: Callable[[], int]) -> None:
    if notice["ending"] == "failed":
        _has_no_sentence.wait(OWN_MESSAGE)
    if not _connections:  # this process has left
        return
    first_here = 1 if notice["local_rank"] == 0 and notice["host"] == _me["host"] else 0
    sentence = f"train.py: rank {_me['rank']} ends because rank {notice['rank']} has."
    if _me["local_rank"] in (0, first_here):  # once a machine
        sentence = (
            f"train.py: error: Rank {notice['rank']} (pid {notice['pid']} on {notice['host']}) "
            f"{ENDINGS[notice['ending']]}; this run ends. Its own message or its machine's system log (dmesg: out of "
            "memory?) says why; go on with --resume_from_checkpoint latest."
        )
    say_before_the_end(sentence)
    flush_before_the_end()
    os._exit(exit_code())  # the main thread waits in a collective that will not end


def _send(connection: socket.socket, message: dict) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _read_line(connection: socket.socket) -> bytes:
    """Return a line without its end, or what was sent before the connection closed."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 1000 and (byte := connection.recv(1)):
        line += byte
    return line.removesuffix(b"\n")


def _forget() -> None:
    """Close, in a forked child, its copies of the connections, which would stay open after this process's death."""
    for connection in _connections:
        os.close(connection.detach())
    _connections.clear()


os.register_at_fork(after_in_child=_forget)
