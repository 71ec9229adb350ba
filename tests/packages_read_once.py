"""Reads what is known of an installed package once in a process, as no package is installed while tests run.

accelerate asks for it whenever it wants to know whether there is DeepSpeed, and a run logs versions: sixteen readings,
each a parsing of several hundred lines, take a twentieth of the CPU time of a tiny run.
"""

import functools
import importlib.metadata


def read_packages_once() -> None:
    """Have `importlib.metadata` keep each distribution and its parsed metadata."""
    known = importlib.metadata.Distribution
    known.from_name = functools.cache(known.from_name)
    parsed = functools.cached_property(known.metadata.fget)
    parsed.__set_name__(known, "metadata")
    known.metadata = parsed
