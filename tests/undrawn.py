"""Stands for the drawing of `curves.png` at the end of the runs of tests: it takes longer than they train.

Not in tests/training/test_summary.py, which is about it, nor in what is launched as users launch it.
"""

from pathlib import Path

from mini_llava.files import atomic_write


def write_undrawn(log: Path, file: Path) -> None:
    """Does what `draw_curves` does with files, whose order the crash tests look at."""
    with atomic_write(file) as content:
        content.write(b"not drawn")
