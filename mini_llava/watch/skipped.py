"""Records that cannot be trained on: refused or skipped, listed in `skipped.jsonl`, counted by cause.

LLaVA replaces a record that raises by another one, or zeroes its labels, silently.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from ..data.records import RecordStore
from ..data.templates import BadRecord
from ..words import counted
from .json_lines import append_lines, read_lines


def refuse_or_report(store: RecordStore, bad: dict[int, str], on_bad_sample: str) -> list[str]:
    """Return how many bad records there are of each kind; with `--on_bad_sample error` raise BadRecord with them."""
    if bad and on_bad_sample == "error":
        advice = "fix them, or leave them out with --on_bad_sample skip, or with --exclude and the list that "
        advice += "mini_llava.tools.doctor writes."
        if len(bad) == len(store):  # mostly a flag is wrong then
            advice = "see which flag does not fit the data (--image_folder, --version, --model_max_length?)."
        title = f"{len(bad):,} of {counted(len(store), 'record')} cannot be trained on; {advice}"
        raise BadRecord("\n".join([title, *fault_table(store, sorted(bad.items()))]))
    return count_reasons(bad.values())


def fault_table(
    store: RecordStore, sentences: Iterable[tuple[int, str]], examples: int = 2, most: int = 20
) -> list[str]:
    """Return a line for each of the `most` frequent kinds of fault with the number of records, and some examples."""
    kinds = defaultdict(list)
    for index, sentence in sentences:
        kinds[kind_of_fault(sentence)].append((index, sentence))
    lines = []
    for kind, found in sorted(kinds.items(), key=lambda item: -len(item[1]))[:most]:
        lines.append(f"{len({index for index, _ in found}):>9,}  {kind}")
        lines += [f"{'':13}{store.describe(index)}: {sentence}" for index, sentence in found[:examples]]
    if len(kinds) > most:
        lines.append(f"... and {counted(len(kinds) - most, 'other kind')} of fault")
    return lines


def log_skipped(store: RecordStore, skipped: Iterable[tuple[int, str]], file: Path) -> None:
    """Append records to `skipped.jsonl`, which `--exclude` reads.

    An entry's index counts excluded records, too, and its digest is of the record's bytes.
    """
    entries = []
    for index, reason in skipped:
        entry = {"index": store.position(index), "record": store.describe(index), "reason": reason}
        entries.append(entry | {"digest": store.record_digest(index)})
    if entries:
        file.parent.mkdir(parents=True, exist_ok=True)
        append_lines(file, entries)


def count_skipped(file: Path) -> list[str]:
    """Count the records in a `skipped.jsonl` by reason; one that was skipped in several epochs counts once."""
    return count_reasons({entry["index"]: entry["reason"] for entry in read_lines(file)}.values())


def count_reasons(reasons: Iterable[str]) -> list[str]:
    """Return `3 records: turn # is not an object.` for each kind of fault, the most frequent first."""
    counts = Counter(map(kind_of_fault, reasons))
    return [f"{counted(count, 'record')}: {kind}" for kind, count in counts.most_common()]


def kind_of_fault(reason: str) -> str:
    """Replace quotations and numbers in a sentence about a record, so that equal faults have equal sentences."""
    reason = re.sub(r"""(?<!\w)b?('(\\.|[^'\\])*'|"(\\.|[^"\\])*")""", "…", reason)
    return re.sub(r"(?<!\w)\d\w*([.+]\d\w*)*", "#", reason)
