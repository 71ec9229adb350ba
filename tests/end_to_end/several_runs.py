"""Started once by a launcher: runs `train.py`'s `train` for several command lines, one after the other.

Starting two DeepSpeed processes costs 10 to 20 seconds, most of it imports, and training a tiny model one or two. So
every run gets a fork of the started process, with nothing of the run before it but the imported modules.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import deepspeed  # noqa: F401  imported once, for all forks

import train
from mini_llava import arguments as flags


def main(file: Path) -> None:
    for port, command_line in json.loads(file.read_text()):
        if (child := os.fork()) == 0:
            # The launcher's own meeting point still holds the addresses of the run before: rank 0 opens another.
            os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
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
            sys.exit(1)  # at once, so that the launcher ends the other rank, which may wait for this one


if __name__ == "__main__":
    main(Path(sys.argv[1]))
