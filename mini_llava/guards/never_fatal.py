"""Reports may fail, the run may not: what fails to be written or shown costs a warning."""

import contextlib
import warnings
from collections.abc import Iterator

from ..errors import UserError


@contextlib.contextmanager
def never_fatal(consequence: str) -> Iterator[None]:
    """Turn what fails inside into a warning, the first time that it has this consequence."""
    try:
        yield
    except Exception as error:  # trackers raise whatever their networks and libraries raise
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        warn_once(f"{consequence}; the run goes on", f"{kind}{str(error).removesuffix('.')}")


_told: set[str] = set()


def warn_once(consequence: str, reason: str) -> None:
    # Python's own "once" begins anew whenever somebody changes the filters, as reading an image does.
    if consequence not in _told:
        _told.add(consequence)
        warnings.warn(f"{consequence} ({reason}).", stacklevel=2)
