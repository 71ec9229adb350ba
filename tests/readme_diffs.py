"""The diffs that README shows, applied to a copy of the file."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

from tests.launching import ROOT
from tests.readme import PAGES


def patched(name: str, added: str, folder: Path) -> ModuleType:
    """The module `mini_llava/NAME.py` with the diff that adds something of this name, of ten lines at most."""
    [diff] = re.findall(rf"^```diff\n([^`]*{added}[^`]*)^```$", PAGES, re.M)
    assert len(diff.splitlines()) <= 10
    file = folder / "mini_llava" / f"{name}.py"
    file.parent.mkdir(parents=True)
    shutil.copy(ROOT / "mini_llava" / f"{name}.py", file)
    subprocess.run(["git", "apply", "--verbose", "-"], input=diff, text=True, cwd=folder, check=True)
    specification = importlib.util.spec_from_file_location(f"mini_llava.{file.parent.name}.patched_{file.stem}", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
