"""What is not there is missed before anything is loaded, with the sentence that the run itself would end with."""

import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
from accelerate.commands import launch as accelerate_launch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from transformers.utils import is_flash_attn_2_available

from mini_llava import arguments as flags
from mini_llava import launch
from mini_llava.formats import read
from mini_llava.guards.early import check_launch
from mini_llava.options.packages import TRACKERS, installed_trackers
from mini_llava.tools import inspect, tour
from mini_llava.training.checkpoint import CheckpointError
from tests.end_to_end import runs
from tests.forked_runs import ROOT

IMAGES, RECORDS = runs.FIXTURES / "data" / "images", runs.FIXTURES / "data" / "train_stage2.json"
LORA = {"lora_enable": True}
TO_READ = [
    ({"data_path": "none.json"}, "The data file none.json (--data_path) does not exist."),
    ({"data_path": IMAGES}, "images (--data_path) is a directory: give the file in it."),
    ({"image_folder": RECORDS}, "train_stage2.json (--image_folder) is not a directory."),
    ({"image_folder": "none"}, "The image folder none (--image_folder) does not exist."),
    ({"exclude": "none.jsonl"}, "The list none.jsonl (--exclude) does not exist."),
    ({"eval_data_path": "none.json"}, "The data file none.json (--eval_data_path) does not exist."),
    ({"eval_data_path": RECORDS, "eval_image_folder": "none"}, "folder none (--eval_image_folder) does not exist."),
    ({"sample_order": "none.json"}, "The order none.json (--sample_order) does not exist."),
    ({"pretrain_mm_mlp_adapter": "none.bin"}, "There is no projector at none.bin."),
    ({"pretrain_mm_mlp_adapter": IMAGES}, "There is no projector at "),
    (LORA | {"lora_weight_path": "none"}, "none (--lora_weight_path) does not exist; give the directory of an earlier"),
    (LORA | {"lora_weight_path": IMAGES}, "images has neither adapter_model.safetensors nor adapter_model.bin: it is"),
]
TO_RUN = [
    ({"report_to": "clearml"}, "--report_to clearml: not installed or unknown."),
    ({"resume_from_checkpoint": "none/checkpoint-3"}, "--resume_from_checkpoint none/checkpoint-3 does not exist."),
    ({"resume_from_checkpoint": RECORDS}, "train_stage2.json is not a directory."),
    ({"resume_from_checkpoint": IMAGES}, "images is torn: "),
]
if importlib.util.find_spec("liger_kernel") is None:
    TO_RUN += [({"use_liger_kernel": True}, "--use_liger_kernel True: the package is not installed;")]
if not is_flash_attn_2_available():
    TO_RUN += [({"attn_implementation": "flash_attention_2"}, "flash_attention_2: the package flash-attn is not")]
if importlib.util.find_spec("bitsandbytes") is None:
    TO_RUN += [(LORA | {"bits": 4}, "--bits 4 needs the package bitsandbytes: pip install bitsandbytes.")]


@pytest.fixture
def nothing_is_opened(monkeypatch):
    """Reading the model would fail: whatever is missed is missed before."""
    for name in ("read_json", "find_file"):
        monkeypatch.setattr(read, name, lambda *_: pytest.fail("the model was looked at"))


def names(values: list) -> list[str]:
    return [", ".join(values) for values, _ in values]


@pytest.mark.parametrize(("values", "sentence"), [*TO_READ, *TO_RUN], ids=names([*TO_READ, *TO_RUN]))
def test_a_run_misses_it_before_the_model_is_looked_at(values, sentence, nothing_is_opened, tmp_path):
    with pytest.raises((OSError, ValueError, CheckpointError)) as refused:
        runs.train_here(runs.flags_of(2, tmp_path / "out", values))
    assert sentence in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("values", "sentence"), TO_READ, ids=names(TO_READ))
def test_the_plan_and_the_tools_miss_a_file_with_the_same_sentence(
    values, sentence, nothing_is_opened, tmp_path, capsys
):
    words = runs.flags_of(2, tmp_path / "out", values)
    if not {"pretrain_mm_mlp_adapter", "lora_weight_path"} & set(values):  # which a plan need not have yet
        with pytest.raises((OSError, ValueError)) as refused:
            runs.plan_here(words)
        assert sentence in str(refused.value)
    for tool in (inspect, tour):
        assert tool.main(words) == 2
        assert sentence in capsys.readouterr().err


# --- what is imported for it -----------------------------------------------------------------------------------------

TAKES_SECONDS = {"torch", "transformers", "accelerate", "deepspeed"}
TOOLS = [f"-m mini_llava.tools.{tool}" for tool in ("chat", "convert", "doctor", "export", "inspect", "plan", "tour")]
FLAGS = " ".join(runs.flags_of(2, "{0}/out", {}))
REFUSED = [
    (f"train.py {FLAGS} --learning_rte 1", "train.py: error: unknown flag --learning_rte"),
    (f"train.py {FLAGS} --bf16 True --fp16 True", "train.py: error: --bf16 and --fp16 cannot both be True."),
    ("train.py --config {0}/none.yaml", "none.yaml: No such file or directory."),
    *((f"train.py {' '.join(runs.flags_of(2, '{0}/out', values))}", text) for values, text in (TO_READ + TO_RUN)[::2]),
    (f"train.py {FLAGS} --output_dir {{0}}/file", "/file (--output_dir) is a file."),
    (f"train.py {FLAGS} --output_dir {{0}}/trained", "/checkpoint-2 is there from an earlier run."),
    (f"train.py {FLAGS} --output_dir {{0}}/foreign", "/foreign (--output_dir) holds config.json, which no run of"),
    ("-m mini_llava.tools.chat {0}/none", "chat: error: "),
    ("-m mini_llava.tools.convert {0}/none --output {0}/out", "convert: error: "),
    (
        "-m mini_llava.tools.doctor --data_path none.json --model_name_or_path {0}/none --tokens_per_image 4",
        "doctor: e",
    ),
    ("-m mini_llava.tools.export {0}/none {0}/file", "file (OUT) is a file."),
    (f"-m mini_llava.tools.inspect {FLAGS} --data_path none.json", "inspect: error: The data file none.json"),
    (f"-m mini_llava.tools.plan {FLAGS} --data_path none.json", "plan: error: The data file none.json"),
    (f"-m mini_llava.tools.plan {FLAGS} --num_gpus 0", "plan: error: --num_gpus must be positive, not 0."),
    (f"-m mini_llava.tools.tour {FLAGS} --data_path none.json", "tour: error: The data file none.json"),
]


def started(words: str, folder) -> tuple[int, str, set[str]]:
    """Exit code, what was printed, and which of the packages that take seconds to import were imported."""
    command = [sys.executable, "-X", "importtime", *words.format(folder).split()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    listed, printed = [], [run.stdout]
    for line in run.stderr.splitlines(keepends=True):
        (listed if line.startswith("import time:") else printed).append(line)
    modules = {line.rsplit("|", 1)[1].strip() for line in listed}
    assert "argparse" in modules
    return run.returncode, "".join(printed), modules & TAKES_SECONDS


@pytest.mark.parametrize("program", ["train.py", *TOOLS])
def test_the_help_is_printed_before_anything_large_is_imported(program, tmp_path):
    code, printed, imported = started(f"{program} --help", tmp_path)
    assert code == 0 and "usage: " in printed and not imported


@pytest.mark.parametrize(("words", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_flags_are_refused_before_anything_large_is_imported(words, sentence, tmp_path):
    (tmp_path / "file").touch()
    for name, content in (
        ("trained/checkpoint-2/manifest.json", '{"kind": "training state"}'),
        ("foreign/config.json", ""),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(content)
    code, printed, imported = started(words, tmp_path)
    assert code in (1, 2) and sentence in printed.strip().splitlines()[-1] and not imported
    assert {path.name for path in tmp_path.iterdir()} == {"file", "trained", "foreign"}, "a refusal leaves no trace"


def test_the_trackers_are_those_of_accelerate():
    assert {*TRACKERS, "all"} == set(LoggerType.list())
    assert set(installed_trackers()) == {str(tracker) for tracker in get_available_trackers()}


# --- what is written -------------------------------------------------------------------------------------------------


def refused(output_dir, **values) -> str:
    with pytest.raises((OSError, CheckpointError)) as error:
        runs.train_here(runs.flags_of(2, output_dir, values))
    return str(error.value)


def test_an_output_directory_that_cannot_be_is_refused(nothing_is_opened, tmp_path):
    (tmp_path / "file").touch()
    assert "file (--output_dir) is a file." in refused(tmp_path / "file")
    assert f"cannot be made: {tmp_path / 'file'} is a file." in refused(tmp_path / "file" / "inside" / "it")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "link (--output_dir) is a link that leads nowhere." in refused(tmp_path / "link")


@pytest.mark.skipif(os.name != "posix" or not os.path.isdir("/proc/self"), reason="needs a folder nobody can write to")
def test_an_output_directory_where_nothing_can_be_written_is_refused(nothing_is_opened):
    assert "/proc/run (--output_dir) cannot be written: /proc: " in refused("/proc/run")


def test_checkpoints_of_an_earlier_run_and_of_none_are_named(nothing_is_opened, tmp_path):
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "manifest.json").write_text("{}")
    assert "checkpoint-10 is there from an earlier run." in refused(tmp_path)
    text = refused(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-3")
    assert text == (
        f"--resume_from_checkpoint {tmp_path}/checkpoint-3 does not exist. There are {tmp_path}/checkpoint-2, "
        f"{tmp_path}/checkpoint-10. `latest` takes the newest one."
    )
    elsewhere = refused(tmp_path, resume_from_checkpoint="elsewhere/checkpoint-3")
    assert f"There are {tmp_path}/checkpoint-2, " in elsewhere
    assert f"There is none in {tmp_path}/new either." in refused(tmp_path / "new", resume_from_checkpoint="none")


# --- processes -------------------------------------------------------------------------------------------------------

BY_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
FEWER = BY_ACCELERATE | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_fewer_processes_than_asked_for_are_missed_and_nothing_else():
    with pytest.raises(ValueError, match="was asked for several processes or machines and has started one"):
        check_launch(FEWER)
    for environment in ({}, BY_ACCELERATE, FEWER | {"WORLD_SIZE": "2"}, FEWER | {"OMPI_COMM_WORLD_SIZE": "2"}):
        check_launch(environment)


@pytest.mark.parametrize("processes, missed", [("1", False), ("2", True)])
def test_an_address_that_a_job_script_exports_is_no_wish_for_several_processes(processes, missed, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setattr(os, "execvpe", lambda file, command, environment: check_launch(environment))
    words = ["--config_file", str(ROOT / "accelerate_configs/cpu.yaml"), "--num_processes", processes, "train.py"]
    given = accelerate_launch.launch_command_parser().parse_args(words)
    monkeypatch.setattr(accelerate_launch, "simple_launcher", launch.become)
    with pytest.raises(ValueError, match="has started one") if missed else nullcontext():
        accelerate_launch.launch_command(given)


@pytest.mark.slow
def test_accelerate_is_asked_for_two_processes_on_a_cpu(tmp_path):
    words = runs.flags_of(2, tmp_path / "out", {"max_steps": 1})
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "2"]
    run = subprocess.run([*command, "train.py", *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("train.py: error: The launcher was asked for several processes")


def test_every_tool_takes_a_stage_from_the_file():
    recipe = str(ROOT / "mini_llava/recipes/llava-1.5-7b-pretrain.yaml")
    assert flags.parse_for_a_tool(["--config", recipe], "tour").stage == 1
