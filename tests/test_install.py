"""The package can be installed; it asks for all that it imports, in versions that the checks run with."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = subprocess.run(["git", "ls-files", "mini_llava"], cwd=ROOT, capture_output=True, text=True).stdout.split()
# Taken where they are installed; each has a sentence, or another way, where it is not.
OPTIONAL = {"flash_attn", "liger_kernel", "timm", "triton", "datasets", "streaming", "litdata"}


def asked_for() -> dict[str, Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = [Requirement(line) for lines in lists for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_the_versions_of_the_checks_are_among_those_that_are_asked_for():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pinned = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    pinned["huggingface-hub"] = version("huggingface-hub")  # transformers brings it
    assert all(requirement.specifier.contains(pinned[name]) for name, requirement in asked_for().items())


def test_all_that_is_imported_is_asked_for():
    distributions, imported = packages_distributions(), set()
    for file in [ROOT / "train.py", *(ROOT / name for name in FILES if name.endswith(".py"))]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    imported -= sys.stdlib_module_names | OPTIONAL | {"mini_llava"}
    assert {"torch", "transformers", "yaml", "PIL"} <= imported
    unasked = {
        name
        for name in imported
        if not {canonicalize_name(each) for each in distributions.get(name, [name])} & asked_for().keys()
    }
    assert not unasked


def test_a_wheel_has_every_module_the_demos_models_and_the_recipes(tmp_path):
    tree = tmp_path / "tree"
    for name in [*FILES, "pyproject.toml", "README.md", "LICENSE", "train.py", "tests/test_install.py"]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", "."]
    run = subprocess.run([*command, str(tree)], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    [wheel] = tmp_path.glob("mini_llava-*.whl")
    inside = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(inside) == sorted(FILES)
