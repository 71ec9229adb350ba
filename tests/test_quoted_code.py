"""Code that a page quotes is in the file that the quote names, so that no page shows a loop of the past."""

import re
from textwrap import dedent

import pytest

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
