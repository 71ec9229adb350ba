#!/usr/bin/env bash
# accelerate 1.15.0: SIGTERM to `accelerate launch` of one process ends the launcher alone; the training goes on.
#
# Several processes are started by torchrun, which passes the signal on and waits. One process is started as a plain child
# that nobody tells: a scheduler or a shell that stops the command it has started believes that the job is over, while the
# training, now an orphan, holds the GPU and writes on, beside the next run of the same command.
#
# Seen with torch 2.13.0 (CPU):
#   launcher ended by signal 15, its child is running
#
# Fails when the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 accelerate==1.15.0
cat > "$folder/training.py" <<'PYTHON'
import os
import pathlib
import time

folder = pathlib.Path(__file__).parent
(folder / "pid.part").write_text(str(os.getpid()))
(folder / "pid.part").rename(folder / "pid")
time.sleep(60)
PYTHON
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import os
import pathlib
import signal
import subprocess
import sys
import time

folder = pathlib.Path(sys.argv[1])
launcher = subprocess.Popen([folder / "venv/bin/accelerate", "launch", "--cpu", "--num_processes", "1", folder / "training.py"])
while not (folder / "pid").exists():
    assert launcher.poll() is None, "the launcher has ended by itself"
    time.sleep(0.1)
child = int((folder / "pid").read_text())
launcher.terminate()
code = launcher.wait()
time.sleep(2)
try:
    os.kill(child, 0)
    running = True
except ProcessLookupError:
    running = False
print(f"launcher ended by signal {-code}, its child is {'running' if running else 'gone'}")
if running:
    os.kill(child, signal.SIGKILL)
assert code == -signal.SIGTERM and running
PYTHON
