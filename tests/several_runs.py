"""Launched once in two processes: trains each command line of a JSON file, one after the other.

Launching two processes takes 15 seconds, most of it imports, and training a tiny model two. So each run gets a fork of
the started process, with nothing of the run before it but the imported modules.
"""

import json
import os
import resource
import socket
import sys
import traceback
from pathlib import Path

from torch.distributed import TCPStore

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed  # noqa: F401  here, for all forks

import train
from mini_llava import arguments as flags


def main(listing: Path) -> None:
    assert os.environ["WORLD_SIZE"] == "2", "one process would pass every test and show nothing"
    launchers_store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    for number, (command_line, largest_file) in enumerate(json.loads(listing.read_text())):
        # The launcher's store still holds the addresses of the run before: each run opens a store of its own, at a port
        # that is looked for when it is needed, for others may have taken it since the launch.
        if os.environ["RANK"] == "0":
            launchers_store.set(f"port of run {number}", str(free_port()))
        port = launchers_store.get(f"port of run {number}").decode()
        if (child := os.fork()) == 0:
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": port}
            status = 1
            if largest_file and os.environ["RANK"] == "1":
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            try:
                train.train(flags.parse_arguments(command_line))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        if os.waitpid(child, 0)[1] != 0:  # at once, so that the launcher ends the other rank, which may wait for this
            sys.exit(f"failed: {' '.join(command_line)}")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
