"""README's commands for one's own model and data run as they stand: tiny stand-ins lie under the names that they give.

Only their size is changed: two processes instead of eight, one step. Hub names are folders here.
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests import forked_runs
from tests.end_to_end.runs import FIXTURES
from tests.launching import ROOT
from tests.readme import PAGES, block_with, blocks
from tests.test_readme import commands
from tests.tools.test_convert import JPEG, chat, embedded, save_to_disk

pytestmark = pytest.mark.slow

LAUNCH = "python -m mini_llava.launch --config_file accelerate_configs"

SMALLER = (
    "--max_steps 1 --warmup_ratio 0 --global_batch_size 4 --per_device_train_batch_size 2 --dataloader_num_workers 0"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The repository, and beside it all that README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("mini_llava", "accelerate_configs", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    for name, model in {"lmsys/vicuna-7b-v1.5": "llm", "openai/clip-vit-large-patch14-336": "clip"}.items():
        (folder / name).parent.mkdir()
        (folder / name).symlink_to(FIXTURES / model)
    for name, stage in {"blip_laion_cc_sbu_558k": 1, "llava_v1_5_mix665k": 2}.items():
        (folder / f"{name}.json").symlink_to(FIXTURES / "data" / f"train_stage{stage}.json")
    for name in ("images", "data"):
        shutil.copytree(FIXTURES / "data" / "images", folder / name)
    (folder / "data" / "llava_v1_5_mix665k.json").symlink_to(folder / "llava_v1_5_mix665k.json")
    save_to_disk(folder / "data" / "train", [{"image": embedded(JPEG), "conversations": chat("<image>\nWho?", "I.")}])
    (folder / "data" / "images").mkdir()
    (folder / "data" / "images" / "000000215677.jpg").write_bytes(JPEG)
    (folder / "my_run.yaml").write_text(block_with("# my_run.yaml") + "global_batch_size: 8\n")
    return folder


@pytest.fixture(scope="module")
def stage_1(folder) -> str:
    """What stage 1 prints; its projector is one that my_run.yaml names."""
    return printed_by(f"{LAUNCH}/zero2.yaml train.py --stage 1", folder)


def printed_by(start: str, folder: Path, as_fork: bool = True) -> str:
    """Runs the one command of README that begins so, as a fork that has its imports or by an interpreter of its own.

    tests/test_launcher.py and test_two_machines.py start the launcher itself.
    """
    inline = [" ".join(text.split()) for text in re.findall(r"`(python [^`]+)`", PAGES)]
    found = [text for block in blocks(PAGES, "bash") for text in commands(block)] + inline
    [command] = {start} & set(found) or {text for text in found if text.startswith(start)}
    output, inside = folder / "printed.txt", functools.partial(os.chdir, folder)
    if as_fork:
        _, *words = shlex.split(command)
        config, processes = None, 1
        if words[:3] == ["-m", "mini_llava.launch", "--config_file"]:
            config, processes, words = folder / words[3], 2, words[4:] + SMALLER.split()
        program, *flags = words[1:] if words[0] == "-m" else words
        if program == "train.py" and config is None:
            flags += SMALLER.split()
        run = forked_runs.start(flags, output, config, processes, program=program, inside=inside)
        assert run.wait() == 0, run.text[-5000:]
        return run.text
    command = command.replace("python", sys.executable, 1)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.run(command, shell=True, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    assert run.returncode == 0, run.stdout[-5000:]
    return run.stdout


def scalars_in_tensorboard(folder: Path) -> list[str]:
    """The names of the curves that README's command for TensorBoard serves."""
    [command] = re.findall(r"`(tensorboard [^`]+)`", PAGES)
    command = [sys.executable, "-m", "tensorboard.main", *command.split()[1:], "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as server:
        try:
            address = next(filter(None, (re.search(r"http://\S+:\d+/", line) for line in server.stderr)))[0]
            for _ in range(240):  # it reads the files while it already answers
                with urllib.request.urlopen(f"{address}data/plugin/scalars/tags") as answer:
                    if runs := json.load(answer):
                        return [name for tags in runs.values() for name in tags]
                time.sleep(0.25)
        finally:
            server.terminate()
    raise AssertionError("TensorBoard shows no run")


def test_both_stages_of_ones_own_model(folder, stage_1):
    assert "2 processes, DeepSpeed ZeRO-2, bf16" in stage_1
    second = f"{LAUNCH}/zero3.yaml train.py --stage 2 --model_name_or_path"
    assert "2 processes, DeepSpeed ZeRO-3, bf16" in printed_by(second, folder)
    assert (folder / "outputs" / "stage2" / "model.safetensors").is_file()
    assert {"loss", "norms/gradient_norm", "speed/tokens_per_second"} <= set(scalars_in_tensorboard(folder))

    (folder / "outputs" / "llava-1.5-7b-pretrain").symlink_to(folder / "outputs" / "stage1")
    printed_by(second.partition(" --model")[0] + " --config mini_llava/recipes/", folder)
    assert (folder / "outputs" / "llava-1.5-7b-finetune" / "model.safetensors").is_file()


def test_a_run_of_ones_own_file_and_a_talk_to_its_result(folder, stage_1):
    printed = printed_by(f"{LAUNCH}/zero3.yaml train.py --stage 2 --config my_run.yaml", folder)
    assert "2 processes, DeepSpeed ZeRO-3, bf16" in printed and "starts at random" not in printed
    assert (folder / "outputs" / "my-run" / "model.safetensors").is_file()
    assert "1 process, no distribution" in printed_by("python train.py --stage 2 --config my_run.yaml", folder)
    assert "ASSISTANT" not in printed_by("python -m mini_llava.tools.chat outputs/my-run", folder)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("python train.py --help", "--mm_projector_lr"),
        ("python -m mini_llava.tools.plan", "It fits: "),
        ("python -m mini_llava.tools.inspect --config my_run.yaml", "USER"),
        ("python -m mini_llava.tools.doctor --data_path", "80 records"),
        ("python -m mini_llava.tools.doctor --config", "80 records"),
    ],
)
def test_a_look_at_a_run_and_at_its_data(start, expected, folder, stage_1):
    assert expected in printed_by(start, folder, as_fork="inspect" not in start)  # the others are started elsewhere


def test_data_of_another_layout(folder):
    printed_by("python -m mini_llava.tools.convert data/train", folder)
    [line] = (folder / "converted" / "records.jsonl").read_text().splitlines()
    assert json.loads(line)["conversations"] == chat("<image>\nWho?", "I.")
