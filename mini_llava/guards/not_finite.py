"""A loss or gradient that is not finite ends the run before it is stepped, and the records that led to it are named.

LLaVA trains on with weights that are not finite any more, or silently skips the step under DeepSpeed.
"""

import math
from pathlib import Path

from accelerate import Accelerator

from ..data.loader import RankStep
from ..data.records import RecordStore
from ..data.sampler import GlobalBatchSampler
from ..training.backend import gather_from_ranks, sum_over_ranks
from ..training.lockstep import DataFault
from ..watch.meter import Meter
from ..watch.skipped import log_skipped
from .never_fatal import never_fatal


def why_not_taken(
    accelerator: Accelerator, meter: Meter, sampler: GlobalBatchSampler, work: RankStep, store: RecordStore
) -> DataFault | None:
    """Return, the same on all ranks, why a step whose gradient is not finite ends the run; list its records.

    In fp16 a gradient that overflows while the loss is finite is usual: the step is left out, the scale lowered, and
    the run goes on: None.
    """
    step, output_dir = sampler.step + 1, Path(accelerator.project_dir)
    loss = float(sum_over_ranks(accelerator, meter.loss))
    if accelerator.mixed_precision == "fp16" and math.isfinite(loss):
        return None
    records = [index for of_rank in gather_from_ranks(accelerator, work.records) for index in of_rank]
    what = "its gradient is not finite" if math.isfinite(loss) else f"its loss is {loss}"
    file = output_dir / "not_finite.jsonl"
    if accelerator.is_main_process:
        with never_fatal(f"{file} lacks entries"):
            log_skipped(store, [(index, f"step {step}: {what}") for index in records], file)
    shown = ", ".join(store.describe(index) for index in records[:20]) + (" ..." if len(records) > 20 else "")
    return DataFault(
        f"Step {step} was not taken: {what}. The state before it is kept, and no older one is removed for it. The "
        f"records of its global batch are listed in {file}, a file for --exclude: {shown}"
    )
