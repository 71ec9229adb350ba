"""Behind the sentence in which a run ends nothing is printed, and its exit code is the launcher's."""

import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from accelerate.commands.config import config_args

from mini_llava import launch
from tests.end_to_end import runs
from tests.forked_runs import ROOT

TWO = ["--config_file", "accelerate_configs/zero3.yaml", "--num_processes", "2", "--main_process_port", "0"]
ONE = ["--config_file", "accelerate_configs/cpu.yaml"]


def launched(launcher: list, words: list, program="train.py") -> tuple[int, list[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "mini_llava.launch", *launcher, str(program), *words]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    return run.returncode, run.stderr.strip().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ONE, TWO], ids=["one process", "ZeRO-3 on two"])
def test_a_faulty_flag_is_said_once_and_last(launcher, tmp_path):
    code, lines = launched(launcher, runs.flags_of(2, tmp_path / "out", {"learning_rte": 1}))
    sentence = "train.py: error: unknown flag --learning_rte, did you mean --learning_rate?"
    assert (code, lines[-1]) == (2, sentence)
    assert "Traceback" not in "\n".join(lines) and lines.count(sentence) == 1


@pytest.mark.slow
def test_a_sentence_in_mid_run_is_the_last_thing_printed(tmp_path):
    """Of a picture that is torn, which the rank that opens it finds out."""
    shutil.copytree(runs.FIXTURES / "data" / "images", tmp_path / "images")
    for image in (tmp_path / "images").iterdir():
        image.write_bytes(image.read_bytes()[:200])
    words = runs.flags_of(2, tmp_path / "out", {"image_folder": tmp_path / "images", "global_batch_size": 4})
    code, lines = launched(TWO, words)
    assert code == 1 and "Traceback" not in "\n".join(lines)
    assert re.match(r"train.py: error( on rank 1)?: .*, record \d+ \(id .*\): the image '.*' cannot be read", lines[-1])


@pytest.mark.slow
def test_what_is_wrong_with_the_launchers_own_flags_is_a_sentence():
    code, lines = launched(["--config_file", "none.yaml"], [])
    assert code == 1 and lines[0].startswith("launch: error: ") and "none.yaml" in lines[0] and len(lines) == 1


@pytest.mark.parametrize(
    "config, words, variables, sentence",
    [
        ("", [], {}, "{config} is not a config of accelerate: it must hold `name: value` lines."),
        ("- a", [], {}, "{config} is not a config of accelerate: it must hold `name: value` lines."),
        ("a: [", [], {}, "{config} is not a config of accelerate: while parsing a flow node"),
        ("distributed_type: 'NO'\nnum_processes: two", [], {}, "num_processes is 'two' and num_machines 1: both must"),
        (None, ["--num_machines", "0"], {}, "num_machines 0: both must be whole numbers, with at least one machine."),
        (None, ["--cpu"], {"OMP_NUM_THREADS": "4,2"}, "OMP_NUM_THREADS=4,2: accelerate takes a whole number;"),
        (None, ["--cpu"], {"OMP_NUM_THREADS": ""}, "OMP_NUM_THREADS=: accelerate takes a whole number;"),
    ],
)
def test_what_accelerate_would_end_over_with_a_traceback_is_a_sentence(
    config, words, variables, sentence, tmp_path, monkeypatch, capsys
):
    """Of the config that `accelerate config` writes to HF_HOME, of flags, and of the environment."""
    path = tmp_path / "default_config.yaml"
    if config is not None:
        path.write_text(config)
    for module in (launch, launch.launch, config_args):
        monkeypatch.setattr(module, "default_config_file", str(path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["launch", *words, "train.py"])
    monkeypatch.setattr(logging.root.manager, "loggerDict", {})
    monkeypatch.setattr(launch.launch, "simple_launcher", None)  # which main replaces
    with pytest.raises(SystemExit) as ended:
        launch.main()
    assert str(ended.value).startswith("launch: error: ") and sentence.format(config=path) in str(ended.value)


@pytest.mark.parametrize("gpus", [0, 1, 2])
@pytest.mark.parametrize(
    "words", ["", "--multi_gpu", "--cpu", "--num_processes 2", "--cpu --num_processes 2", "--use_deepspeed"]
)
@pytest.mark.parametrize("mpi", [{}, {"MPI_LOCALNRANKS": "2"}])
def test_defaults_are_accelerates_own(words, gpus, mpi, monkeypatch, tmp_path):
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in mpi.items():
        monkeypatch.setenv(name, value)
    for module in (launch, launch.launch, config_args):
        monkeypatch.setattr(module, "default_config_file", str(tmp_path / "none.yaml"))
    with_ours, without = (launch.launch.launch_command_parser().parse_args([*words.split(), "train.py"]) for _ in "ab")
    launch.give_defaults(with_ours)
    assert vars(launch.launch._validate_launch_command(with_ours)[0]) == vars(
        launch.launch._validate_launch_command(without)[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [[], ["--cpu", "--num_processes", "1"], ONE], ids=["no config", "--cpu", "cpu.yaml"]
)
def test_nothing_is_said_about_defaults_and_they_are_accelerates(launcher, tmp_path):
    (tmp_path / "show.py").write_text("import os, json\nprint(json.dumps(dict(os.environ)))")
    without = ("ACCELERATE_", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(without)}
    environment |= {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    given = []
    for program in ("mini_llava.launch", "accelerate.commands.launch"):
        command = [sys.executable, "-m", program, *launcher, str(tmp_path / "show.py")]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0 and ("not passed" in run.stderr) == (program != "mini_llava.launch"), run.stderr
        given.append({name: value for name, value in json.loads(run.stdout).items() if name.startswith(without)})
    assert given[0] == given[1] and "OMP_NUM_THREADS" in given[0]


@pytest.mark.slow
def test_ctrl_c_at_the_launcher_saves_and_the_runs_sentence_is_the_last(tmp_path):
    words = runs.flags_of(2, tmp_path / "out", {"max_steps": 5000, "global_batch_size": 4})
    command = [sys.executable, "-m", "mini_llava.launch", *TWO, "train.py", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with psutil.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes) as launcher:
        try:
            deadline = time.monotonic() + 300
            while not (tmp_path / "out" / "log.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            launcher.send_signal(signal.SIGINT)
            text, _ = launcher.communicate(timeout=120)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [*launcher.children(recursive=True), launcher]:
                    process.kill()
    assert launcher.returncode == 128 + signal.SIGINT and list((tmp_path / "out").glob("checkpoint-*")), text
    assert "Traceback" not in text and not (tmp_path / "out" / "preempted").exists()
    assert re.match(r"Stopped after step \d+ as asked; ", text.strip().splitlines()[-1])
