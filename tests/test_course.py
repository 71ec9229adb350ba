"""The course, what one step is made of, imports no room: a reader of it meets nothing that is optional."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mini_llava"
COURSE = ("data", "model", "training")
ROOMS = ("options", "formats", "guards", "evaluation", "watch", "tools", "demo")


def imports(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it, as paths from the package: `data/sampler.py`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            elif (node.module or "").startswith("mini_llava"):
                folder = PACKAGE.parent.joinpath(*node.module.split("."))
            else:
                continue
            candidates = [folder.with_suffix(".py"), *(folder / f"{name.name}.py" for name in node.names)]
            found |= {path for path in candidates if path.exists()}
            found |= {path for path in (folder / "__init__.py",) if path.exists()}
    return {path.relative_to(PACKAGE).as_posix() for path in found}


def reached(file: Path) -> dict[str, str]:
    """Every module that is imported with a file, by this or by that: module to the one that imports it."""
    found, open_ends = {}, [file.relative_to(PACKAGE).as_posix()]
    while open_ends:
        importer = open_ends.pop()
        for module in sorted(imports(PACKAGE / importer) - found.keys()):
            found[module] = importer
            open_ends.append(module)
    return found


FILES = [path for folder in COURSE for path in sorted((PACKAGE / folder).glob("*.py"))]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_file_of_the_course_imports_no_room(file):
    rooms = {module: importer for module, importer in reached(file).items() if module.split("/")[0] in ROOMS}
    assert not rooms


def test_the_rooms_are_all_there_is_beside_the_course():
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders == {*COURSE, *ROOMS}
