"""README's code blocks, found by what stands in them and never by the titles around them."""

import re

from tests.launching import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str = README, language: str = r"\w*") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def block_with(text: str) -> str:
    """The one code block of README that holds this text."""
    [block] = [block for block in blocks() if text in block]
    return block
