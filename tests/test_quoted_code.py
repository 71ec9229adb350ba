"""Code that a page quotes or names is there, so that no page shows a loop of the past."""

import re
from textwrap import dedent

import pytest

from mini_llava.options.attention import PACKABLE
from tests.launching import ROOT
from tests.readme import DOCS, README, blocks

QUOTES = [
    (page, block)
    for page, text in {"README.md": README, **DOCS}.items()
    for block in blocks(text, "python")
    if re.match(r"# [\w/]+\.py\n", block)
]


def is_in(quote: str, source: str) -> bool:
    """Whether these lines follow each other in the source, indented as deeply as it may be."""
    wanted = dedent(quote).strip("\n").splitlines()
    lines = source.splitlines()
    starts = range(len(lines) - len(wanted) + 1)
    return any(dedent("\n".join(lines[start : start + len(wanted)])).splitlines() == wanted for start in starts)


@pytest.mark.parametrize(("page", "block"), QUOTES, ids=[f"{page}: {block[:60]}" for page, block in QUOTES])
def test_quoted_code_is_in_its_file(page, block):
    name, _, code = block.removeprefix("# ").partition("\n")
    source = (ROOT / name).read_text(encoding="utf-8")
    for part in re.split(r"^\s*\.\.\.\n", code, flags=re.MULTILINE):
        assert part.strip() and is_in(part, source), f"{page}: not in {name}:\n{part}"


def test_the_guided_read_quotes_the_loop():
    assert any(page == "one_step.md" and block.startswith("# train.py") for page, block in QUOTES)


def test_a_quote_that_has_changed_is_found():
    source = "def double(x):\n    # Twice.\n    return 2 * x\n"
    assert is_in("# Twice.\nreturn 2 * x\n", source)
    assert not is_in("# Twice.\nreturn x * 2\n", source) and not is_in("def double(x):\n    return 2 * x\n", source)


# --- what the pages on the course and on LLaVA name ------------------------------------------------------------------

MODULES = {path.stem: path for path in (ROOT / "mini_llava").rglob("*.py")}
TESTS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
NAMES = sorted({name for page in ("llava.md", "one_step.md") for name in re.findall(r"`([\w./]+)`", DOCS[page])})


@pytest.mark.parametrize("name", [name for name in NAMES if re.search(r"\btest_\w+(\.py)?$", name)])
def test_a_test_that_is_named_is_there(name):
    if name.endswith(".py"):
        assert (ROOT / name if "/" in name else ROOT / "tests" / "parity" / name) in TESTS
    else:
        assert any(f"def {name}(" in text for text in TESTS.values())


@pytest.mark.parametrize("name", [name for name in NAMES if name.split(".")[0] in MODULES and "/" not in name])
def test_a_function_that_is_named_by_its_module_is_there(name):
    module, *attributes = name.split(".")
    if attributes[:1] in ([], ["py"], ["json"]):
        return
    source = MODULES[module].read_text(encoding="utf-8")
    for attribute in attributes:
        assert re.search(rf"^\s*(def |class )?{attribute}\b", source, re.MULTILINE), name


PLACES = re.findall(r"((?:`[\w.]+`(?:, | and )?)+) in `(\w+/\w+\.py)`", DOCS["one_step.md"])


@pytest.mark.parametrize(("names", "file"), PLACES)
def test_a_function_is_in_the_file_that_the_page_says(names, file):
    source = (ROOT / "mini_llava" / file).read_text(encoding="utf-8")
    for name in re.findall(r"\w+", names.replace(" and ", "")):
        assert re.search(rf"^\s*(def|class) {name}\b", source, re.MULTILINE), name


def test_the_model_types_that_are_packed_are_listed():
    [listed] = re.findall(r"Eleven model types are known to do so: (.*?)\. ", " ".join(DOCS["extending.md"].split()))
    assert re.findall(r"`(\w+)`", listed) == list(PACKABLE) and len(PACKABLE) == 11
