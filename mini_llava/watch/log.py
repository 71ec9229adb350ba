"""Entries in log.jsonl and the other reports in JSON lines, and where a resumed run continues them."""

from pathlib import Path

from ..guards.never_fatal import never_fatal
from .json_lines import append_lines, truncate_lines


def append_json_line(file: Path, values: dict) -> None:
    """Append an entry, one JSON object a line with floats to their last bit; a failure is a warning."""
    with never_fatal(f"{file} lacks entries"):
        append_lines(file, [values])


def prepare_reports(output_dir: Path, resumed_at: int | None) -> str | None:
    """Remove the reports of an earlier run, or truncate them to the step that this one resumes from.

    Entries beyond that step belong to work that was lost. Returns a sentence about it if there are any.
    """
    skipped, samples, log = (output_dir / f"{name}.jsonl" for name in ("skipped", "eval_samples", "log"))
    if resumed_at is None:
        for file in (log, samples, skipped):
            with never_fatal(f"{file} holds entries of an earlier run"):
                file.unlink(missing_ok=True)
        return None
    for file in (skipped, samples, log):
        last = {}
        with never_fatal(f"{file} holds torn lines or entries of steps that are done again"):
            last = truncate_lines(file, keep=lambda entry: entry.get("step", 0) <= resumed_at) or {}
    again = last.get("step", 0) - resumed_at
    if again <= 0:
        return None
    return f"The run had come to step {last['step']}: {again} of its steps {'is' if again == 1 else 'are'} done again."
