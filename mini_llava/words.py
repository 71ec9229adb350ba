"""Numbers in sentences."""


def counted(number: int, noun: str) -> str:
    """Return `1 record`, `2,000 records`, `1 process`, `2 processes`."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{number:,} {noun}{ending}"
