"""The code blocks of README and docs/, found by what stands in them and never by the titles around them."""

import re

from tests.launching import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = "".join(f"{page}\n\n" for page in [README, *DOCS.values()])


def blocks(text: str = PAGES, language: str = r"\w*") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def block_with(text: str) -> str:
    """The one code block of all pages that holds this text."""
    [block] = [block for block in blocks() if text in block]
    return block
