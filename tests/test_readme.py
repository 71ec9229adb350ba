"""What README and docs/ say is so: their commands are run, and their files and messages exist.

A command of theirs is run by the test or by the CI that is named here, smaller where it has to be, or is in the short
list of those that the page itself says were not run. The flags of all, and of benchmarks/README.md and the recipes, are
read by the real parsers.
"""

import argparse
import ast
import functools
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from mini_llava import arguments as flags
from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import read_conversation
from mini_llava.evaluation.scoring import metric_of
from mini_llava.guards.records import RecordCheck
from tests import forked_runs
from tests.launching import ROOT
from tests.readme import DOCS, PAGES, README, block_with, blocks

BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")

# Blocks of which all commands are run, by a text in them, and by what.
MACHINES = "tests/end_to_end/test_two_machines.py::commands"
RUN = {
    "python train.py --stage 1 && ": "tests/test_readme.py::test_the_two_commands_train_both_stages",
    "python -m mini_llava.tools.tour": "tests/tools/test_tour.py::test_readme_shows_what_it_prints",
    "mini_llava.tools.chat outputs/demo-lora": "tests/test_demo.py::"
    "test_the_readmes_commands_make_models_that_answer_held_out_questions",
    "--num_machines 2": MACHINES,
    "torchrun --nnodes 2": MACHINES,
    "#SBATCH": MACHINES,
}
OWN = "tests/test_readme_commands.py::test_both_stages_of_ones_own_model"
BESIDE = "tests/model/test_adapters_elsewhere.py::test_trained_biases_are_in_the_base"
OWN_FILE = "tests/test_readme_commands.py::test_a_run_of_ones_own_file_and_a_talk_to_its_result"
LOOK = "tests/test_readme_commands.py::test_a_look_at_a_run_and_at_its_data"
# Commands of other blocks that are run, by how they begin, and by what.
LAUNCH = "python -m mini_llava.launch --config_file accelerate_configs"
RUN_ALONE = {
    f"{LAUNCH}/zero2.yaml train.py --stage 1 --model_name_or_path": OWN,
    f"{LAUNCH}/zero3.yaml train.py --stage 2 --model_name_or_path": OWN,
    f"{LAUNCH}/zero3.yaml train.py --stage 2 --config mini_llava": OWN,
    f"{LAUNCH}/zero3.yaml train.py --stage 2 --config my_run.yaml": OWN_FILE,
    "python -m mini_llava.tools.chat outputs/my-run": OWN_FILE,
    "tensorboard --logdir": OWN,
    "python train.py --stage 2 --config my_run.yaml": OWN_FILE,
    "python train.py --help": LOOK,
    "python -m mini_llava.tools.plan": LOOK,
    "python -m mini_llava.tools.inspect": LOOK,
    "python -m mini_llava.tools.doctor": LOOK,
    "python -m mini_llava.tools.convert": "tests/test_readme_commands.py::test_data_of_another_layout",
    "python -m mini_llava.demo.pretrain": "tests/test_demo_pretrain.py::made",
    "python -m mini_llava.tools.export outputs/lora": BESIDE,
    "python -m pytest tests/parity": "tests/parity/test_model.py::test_logits_are_llavas",
    "python benchmarks/figures.py": "tests/benchmarks/test_figures.py::test_each_figure_is_drawn",
    "python benchmarks/recipe_plans.py": "tests/benchmarks/test_recipe_plans.py::test_a_row_is_what_the_plan_comes_to",
    "python tests/end_to_end/crash_loop.py": (
        "tests/end_to_end/test_crashes.py::test_readmes_command_says_that_all_runs_ended_as_if_nobody_had_killed_them"
    ),
    "python tests/end_to_end/moments.py": (
        "tests/end_to_end/test_preemption.py::test_the_table_of_moments_has_a_row_for_signals_that_end_alike"
    ),
}
# Other people's tools, installed and run by hand.
NOT_RUN = (
    *("python benchmarks/consumers.py", "vllm serve", "python -m lmms_eval"),
    *("transformers serve", "pip install ", "python -m vllm"),
)
CI = {
    "python3 -m venv .venv": "python3 -m venv",
    "source .venv/bin/activate": "/bin/activate",
    "pip install -r requirements.txt": "-r requirements.txt",
    "python -m pytest": "python -m pytest",
    'python -m pytest -m "not slow"': "python -m pytest",  # some of them
}


def commands(block: str) -> list[str]:
    """One a command, without line breaks and comments; a script stays as it is."""
    if block.startswith("#!"):
        return [block]
    lines = re.sub(r" +#.*$", "", block, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [" ".join(part.split()) for line in lines for part in line.split(" && ") if part.strip()]


def all_commands(*texts: str) -> list[str]:
    """In blocks and in lines."""
    found = [command for text in texts for block in blocks(text, "bash") for command in commands(block)]
    inline = re.findall(r"`((?:python|accelerate launch|torchrun|tensorboard) [^`]+)`", "".join(texts))
    found += [" ".join(command.split()) for command in inline if "..." not in command]
    return list(dict.fromkeys(found))


def heads_of_recipes() -> list[str]:
    found = []
    for file in (ROOT / "mini_llava" / "recipes").glob("*.yaml"):
        head = file.read_text(encoding="utf-8").replace(" \\\n#", "")
        heads = re.findall(r"^# (python -m mini_llava.launch .*)", head, re.MULTILINE)
        found += [" ".join(command.split()) for command in heads]
    return found


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def users_folder(tmp_path, monkeypatch) -> Path:
    """As README's reader has it: the repository, and a file of settings."""
    for name in ("mini_llava", "accelerate_configs", "benchmarks", "train.py", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my_run.yaml").write_text(block_with("# my_run.yaml"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Parsed(Exception):
    """A program's parser has taken its command line; the rest are flags that it leaves to train.py."""


def read_by_its_program(module: str, words: list[str], monkeypatch) -> list[str]:
    """Runs a program's `main` until its parser has read the command line; returns the words it knows nothing of."""
    original = argparse.ArgumentParser.parse_known_args

    def parse(self, args=None, namespace=None):
        given, unknown = original(self, args, namespace)
        if inspect.currentframe().f_back.f_code.co_name == "parse_args":
            assert not unknown, f"{module} does not know {unknown}"
        given = [getattr(given, name, "") for name in ("ours", "trainers")]  # a text, or a list if it may be repeated
        texts = [text for value in given for text in ([value] if isinstance(value, str) else value)]
        raise Parsed([*unknown, *(word for text in texts for word in shlex.split(text))])

    main = importlib.import_module(module).main
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr(sys, "argv", [module, *words])
        try:
            if not words and "ArgumentParser" not in inspect.getsource(main):
                return []  # it takes none
            main()
        except Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f"{module} did not read its command line")


def read_by_train(words: list[str]) -> None:
    stages = [words[n + 1] for n, word in enumerate(words) if word == "--stage"] or ["2"]
    flags.parse_arguments(["--stage", stages[-1], *words])


def check_flags(command: str, monkeypatch) -> None:
    """Fails unless every program in a command takes the flags that it is given."""
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)  # a variable
    if words[:2] == ["accelerate", "launch"] or words[:3] == ["python", "-m", "mini_llava.launch"]:
        given = launch_command_parser().parse_args(words[2 + (words[0] == "python") :])
        assert given.config_file is None or Path(given.config_file).is_file()
        script, words = given.training_script, given.training_script_args
    elif words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
        script, words = given.training_script, given.training_script_args
    elif words[:2] == ["python", "-m"]:
        script, words = words[2], words[3:]
    elif words[0] == "tensorboard":
        assert words[1:2] == ["--logdir"] and len(words) == 3
        return
    else:
        assert words[0] == "python", f"{command}: neither run nor read by a parser; add it to this file"
        script, words = words[1], words[2:]
    if words in (["--help"], ["--help_all"]):
        with pytest.raises(SystemExit, match="0"):
            read_by_train(words)
        return
    if script != "train.py":
        module = script.removesuffix(".py").replace("/", ".")
        words = read_by_its_program(module, words, monkeypatch)
        if not words:
            return
        words = ["--config", "my_run.yaml", *words]  # for models and data, which such programs bring themselves
    read_by_train(words)


@pytest.mark.parametrize(
    "command",
    [*all_commands(PAGES, BENCHMARKS), *heads_of_recipes()],
    ids=lambda command: command[:60].replace("\n", " "),
)
def test_a_command_is_run_or_read_by_its_program(command, users_folder, monkeypatch):
    if command.startswith("#!"):
        assert command in map(block_with, RUN)
        return
    if command in CI:
        assert CI[command] in (ROOT / ".ci" / "run").read_text()
        return
    if command.startswith(NOT_RUN):
        for page in (README, *DOCS.values()):
            assert command not in all_commands(page) or "not run by any test" in " ".join(page.split())
        return
    check_flags(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "make everything",
        "python -m mini_llava.tools.chat outputs/demo-merged --no_such_flag",
        "python -m mini_llava.tools.doctor --data_path data.json --tokens_per_image many",
        "python -m mini_llava.launch --config_file accelerate_configs/no_such.yaml train.py --stage 2",
        "accelerate launch train.py --stage 2 --config my_run.yaml --no_such_flag 1",
        "python benchmarks/throughput.py --setup /tmp/bench --stage 2 --no_such_flag 1",
    ],
)
def test_a_command_that_is_wrong_or_unknown_does_not_pass(command, users_folder, monkeypatch):
    with pytest.raises((AssertionError, SystemExit)):
        check_flags(command, monkeypatch)


def test_every_command_of_a_page_is_run_by_a_test_or_by_ci_or_said_not_to_be():
    run = {command for text in RUN for command in commands(block_with(text))}
    alone = [command for command in all_commands(PAGES) if command not in run and command not in CI]
    assert not [command for command in alone if not command.startswith((*RUN_ALONE, *NOT_RUN))]
    assert not [start for start in RUN_ALONE if not any(command.startswith(start) for command in alone)]


@pytest.mark.parametrize("place", dict.fromkeys([*RUN.values(), *RUN_ALONE.values()]))
def test_what_is_said_to_run_commands_is_there(place):
    file, function = place.split("::")
    assert f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_two_commands_train_both_stages(users_folder):
    """As they stand, but in this environment, with fewer steps and fewer questions."""
    command = block_with("python train.py --stage 1 && ")
    command = " ".join(command.replace("\\\n", " ").split()).split("requirements.txt && ")[1]
    assert command.count("python train.py --stage") == 2
    for stage in command.split(" && "):
        _, program, *words = stage.split()
        words += ["--max_steps", "2", "--eval_max_samples", "4"]
        inside = functools.partial(os.chdir, users_folder)
        run = forked_runs.start(words, users_folder / "printed.txt", program=program, inside=inside)
        assert run.wait() == 0, run.text[-5000:]
    assert "The projector comes from stage 1: outputs/demo-stage1/mm_projector.bin." in run.text
    assert (users_folder / "outputs" / "demo-stage2" / "model.safetensors").is_file()


# --- records and settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks(PAGES, "json"))
def test_a_record_that_is_shown_can_be_trained_on(block):
    record = json.loads(block)
    assert RecordCheck()(record) is record
    assert read_conversation(record, get_template("v1"))[1], "no answer"
    assert metric_of(record) == record.get("metric", "exact_match")


@pytest.mark.parametrize("block", blocks(PAGES, "yaml"))
def test_settings_that_are_shown_are_known(block, users_folder):
    """Those in comments too, which the page says may be added."""
    (users_folder / "shown.yaml").write_text(re.sub(r"^# (\w+:)", r"\1", block, flags=re.MULTILINE))
    flags.resolve(2, {"model_name_or_path": "a/b", "data_path": ["data.json"]}, "shown.yaml")


# --- links -----------------------------------------------------------------------------------------------------------


def headings(page: str) -> set[str]:
    """As GitHub turns them into anchors."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{name}" for name in DOCS)])
def test_a_link_leads_to_a_file_and_a_heading(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page):
        file, _, heading = link.partition("#")
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), link
        assert not heading or heading in headings(target.read_text(encoding="utf-8")), link


# --- files and messages ----------------------------------------------------------------------------------------------


def rows(first: str) -> list[list[str]]:
    """The cells of the one table with a row that begins so."""
    tables = re.findall(r"^\|.*?\n\n", PAGES, re.DOTALL | re.MULTILINE)
    [table] = [table for table in tables if f"\n| `{first}" in table]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:] if line]


def named_in_the_map() -> set[str]:
    """The paths in the tables of files, which are relative to the folder in the heading above, if it names one."""
    named = set()
    for part in re.split(r"^##+ ", DOCS["files.md"], flags=re.MULTILINE):
        folder = re.search(r"`([\w/]+/)`", part.partition("\n")[0])
        for table in re.findall(r"^\| file \|.*?(?:\n\n|\Z)", part, re.DOTALL | re.MULTILINE):
            cells = [row.split(" | ")[0] for row in table.splitlines()[2:]]
            names = [name for cell in cells for name in re.findall(r"`(.+?)`", cell)]
            named |= {(folder[1] if folder else "") + name for name in names}
    return named


def test_the_map_has_every_file_and_every_file_is_there():
    named = named_in_the_map()
    assert not [path for path in named if not (ROOT / path).exists()]
    folders = [path for path in named if path.endswith("/")]
    modules = [
        str(path.relative_to(ROOT)) for path in (ROOT / "mini_llava").rglob("*.py") if path.name != "__init__.py"
    ]
    assert not [path for path in modules if path not in named and not path.startswith(tuple(folders))]
    top = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for folder in {path.split("/")[0] + "/" for path in top.splitlines() if "/" in path} - {".ci/", "mini_llava/"}:
        assert folder in named, folder
    assert "train.py" in named


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_a_benchmark_is_named_where_benchmarks_are_explained(file):
    assert file in PAGES + BENCHMARKS


def test_the_files_that_stand_for_llavas_are_there():
    for _, ours in rows("llava/train/train.py`"):
        for path in re.findall(r"`([\w./]+(?:\.py|/))`", ours):
            assert (ROOT / path).exists() or (ROOT / "mini_llava" / path).exists(), path


def sentences() -> list[str]:
    """Every text in the code of train.py and mini_llava/, with … for what is put in."""
    found = []
    for file in [ROOT / "train.py", *(ROOT / "mini_llava").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.fixture(scope="module")
def texts() -> str:
    return "\n".join(sentences())


@pytest.mark.parametrize("message", [cells[0].strip("`") for cells in rows("Memory has run out")])
def test_a_message_that_a_page_explains_is_one_that_the_program_writes(message, texts):
    assert message in texts or f"{message}." in texts
