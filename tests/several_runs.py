"""Launched once in two processes by `launching.py`: trains each [port, command line] of a JSON file, in turn.

Launching two processes takes 15 seconds, most of it imports, and training a tiny model two. So each run gets a fork of
the started process, with nothing of the run before it but the imported modules.
"""

import json
import os
import sys
import traceback
from pathlib import Path

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed  # noqa: F401  here, for all forks

import train
from mini_llava import arguments as flags


def main(listing: Path) -> None:
    assert os.environ["WORLD_SIZE"] == "2", "one process would pass every test and show nothing"
    for port, command_line in json.loads(listing.read_text()):
        if (child := os.fork()) == 0:
            # The launcher's store still holds the addresses of the run before: each run opens a store of its own.
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
            status = 1
            try:
                train.train(flags.parse_arguments(command_line))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        if os.waitpid(child, 0)[1] != 0:
            sys.exit(f"failed: {' '.join(command_line)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
