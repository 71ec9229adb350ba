"""Stands for the drawing of `curves.png` at the end of the runs of tests: it takes longer than they train.

Not in tests/training/test_summary.py, which is about it, nor in what is launched as users launch it.
"""

from pathlib import Path


def write_undrawn(log: Path, file: Path) -> None:
    """Does what `draw_curves` does with files, whose order the crash tests look at."""
    temporary = file.with_name(f".{file.name}.incomplete")
    temporary.write_bytes(b"not drawn")
    temporary.replace(file)
