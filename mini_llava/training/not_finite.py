"""A loss or a gradient that is no number ends the run before it is stepped, and the records that led to it are named.

LLaVA trains on with weights that are not finite any more, or skips the step without a word under DeepSpeed.
"""

import math
import sys
from pathlib import Path

from accelerate import Accelerator

from ..data.loader import RankStep, log_skipped
from ..data.records import RecordStore
from .distributed import gather_from_ranks, sum_over_ranks
from .meter import Meter


def stop_unless_fp16_overflow(
    accelerator: Accelerator, meter: Meter, step: int, work: RankStep, store: RecordStore, output_dir: Path
) -> None:
    """Ends the run on all ranks, the optimizer's step not taken, with the records of the global batch.

    In fp16 a gradient that overflows while the loss is finite is usual: the step is left out and the scale lowered.
    """
    loss = float(sum_over_ranks(accelerator, meter.loss))
    if accelerator.mixed_precision == "fp16" and math.isfinite(loss):
        return
    records = [index for of_rank in gather_from_ranks(accelerator, work.records) for index in of_rank]
    if not accelerator.is_main_process:
        sys.exit(1)
    what = "its gradient is not finite" if math.isfinite(loss) else f"its loss is {loss}"
    file = output_dir / "not_finite.jsonl"
    log_skipped(store, [(index, f"step {step}: {what}") for index in records], file)
    shown = ", ".join(store.describe(index) for index in records[:20]) + (" ..." if len(records) > 20 else "")
    raise SystemExit(
        f"Step {step} was not taken: {what}. Nothing was saved since the last checkpoint. The records of its global "
        f"batch are listed in {file}, a file for --exclude: {shown}"
    )
