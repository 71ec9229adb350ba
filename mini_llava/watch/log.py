"""log.jsonl and the other reports in JSON lines: what a run appends, and where a resumed run goes on in them."""

from pathlib import Path

from ..guards.never_fatal import never_fatal
from .json_lines import append_lines, cut_after


def append_json_line(file: Path, values: dict) -> None:
    """The log as text: one JSON object a line, floats to their last bit, readable without a tracker."""
    with never_fatal(f"{file} lacks entries"):
        append_lines(file, [values])


def prepare_reports(output_dir: Path, resumed_at: int | None) -> str | None:
    """Empties the reports in JSON lines, or makes them end where a resumed run goes on; tells what that undoes.

    Entries beyond the checkpoint's step are of work that was lost, and what a kill has torn is no entry.
    """
    log, samples, skipped = (output_dir / f"{name}.jsonl" for name in ("log", "eval_samples", "skipped"))
    if resumed_at is None:
        for file in (log, samples, skipped):
            with never_fatal(f"{file} holds entries of an earlier run"):
                file.unlink(missing_ok=True)
        return None
    with never_fatal(f"{skipped} has a torn line"):
        cut_after(skipped)
    last = None

    def is_kept(entry: dict) -> bool:
        return entry.get("step", 0) <= resumed_at

    with never_fatal(f"{samples} holds entries of steps that are done again"):
        cut_after(samples, is_kept)
    with never_fatal(f"{log} holds entries of steps that are done again"):
        last = cut_after(log, is_kept)
    if last is None or last.get("step", 0) <= resumed_at:
        return None
    again = last["step"] - resumed_at
    return f"The run had come to step {last['step']}: {again} of its steps {'is' if again == 1 else 'are'} done again."
