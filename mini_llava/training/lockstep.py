"""What all ranks agree on in each step: its trained tokens, and whether and why the run ends after it.

A rank without data must not leave the others waiting in a collective: the run would lose what it has learned since the
last checkpoint. So each rank fetches the data of step n + 1 before it takes step n. The all-reduce that step n begins
with sums, beside the trained tokens of n, whether a rank has none for n + 1 (a bad record, a killed or hanging worker):

    fetch n + 1  ->  all-reduce(tokens of n, faults at n + 1)  ->  train n  ->  read  ->  stop after n, or go on

LLaVA has nothing of the kind.
"""

from collections import deque
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from ..data.loader import RankStep
from ..words import counted
from .backend import gather_from_ranks, sum_over_ranks

STEPS_LOOKED_AT = 10  # over which `--max_skipped_share` is averaged


class DataFault(OSError):
    """The data cannot be trained on any further; the sentence says why."""


class Lockstep:
    """
    Attributes:
        global_trained_tokens: of the current global batch, fp64 on the device.
        global_samples: in that global batch; with none there is no step to take.
        stopping: whether the run ends here; the same on all ranks.
        interrupted: whether it ends because a person pressed Ctrl-C.
        fault: why this rank cannot go on; has_fault: whether any rank cannot, the same on all of them.
        ahead: this rank's data of the next step.
    """

    def __init__(self, accelerator: Accelerator, preemption, max_skipped: float):
        """
        Args:
            preemption: has `asked`, whether this rank should stop, and `interrupted`, whether by Ctrl-C.
            max_skipped: samples per step, averaged over `STEPS_LOOKED_AT` steps; if more are skipped the run ends.
        """
        self.accelerator, self.preemption, self.max_skipped = accelerator, preemption, max_skipped * STEPS_LOOKED_AT
        self.global_trained_tokens = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self.global_samples = self._samples_ahead = 0
        self.stopping = self.interrupted = self.has_fault = False
        self._sums, self._copied = torch.zeros(5, dtype=torch.float64), None
        self.fault: Exception | None = None
        self._skipped: deque[int] = deque(maxlen=STEPS_LOOKED_AT)
        self.ahead: RankStep | None = None

    def steps(self, loader: Iterator[RankStep]) -> Iterator[RankStep]:
        """Yield this rank's steps. The caller must call `read` once in each, before it asks for the next.

        loader: yields them; may raise what makes a step impossible, and end early if the run was asked to stop.
        """
        self._look_ahead(loader)
        self._begin_to_agree(0)
        self.read()  # only here the host waits for the all-reduce
        while self.ahead is not None and not self.stopping:
            work, self.global_samples = self.ahead, self._samples_ahead
            self._look_ahead(loader)
            self._begin_to_agree(sum(work.trained_tokens))
            yield work

    def _look_ahead(self, loader: Iterator[RankStep]) -> None:
        try:
            self.ahead = next(loader, None)
        except Exception as error:  # even a bug in a worker must not cost what was trained
            self.ahead, self.fault = None, error

    def _begin_to_agree(self, trained_tokens: int) -> None:
        ahead = self.ahead or RankStep([], [])
        sums = sum_over_ranks(
            self.accelerator, [trained_tokens, ahead.samples, len(ahead.skipped), *self._reasons_to_stop()]
        )
        self.global_trained_tokens, self._sums = sums[0], sums[1:].to("cpu", non_blocking=True)
        if sums.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> bool:
        """Return whether the run ends after this step; waits until the device has begun the step."""
        if self._copied is not None:
            self._copied.synchronize()
        self._samples_ahead, skipped, *reasons = map(int, self._sums.tolist())
        self._skipped.append(skipped)
        if sum(self._skipped) > self.max_skipped and self.fault is None:  # the same on all ranks
            self.fault = DataFault(self._too_many_skipped())
            reasons[0] += 1
        return self._decide(*reasons)

    def agree(self, fault: Exception | None = None) -> bool:
        """Return whether the run ends here, between two steps. All ranks must call it; the host waits for the device.

        fault: why this rank cannot go on.
        """
        self.fault = self.fault or fault
        return self._decide(*sum_over_ranks(self.accelerator, self._reasons_to_stop()).tolist())

    def stop(self, fault: Exception | None) -> bool:
        """Return whether the run ends here because of a fault that all ranks have found; with None it goes on."""
        if fault is not None:
            self.fault, self.ahead, self.stopping, self.has_fault = fault, None, True, True
        return self.stopping

    def _reasons_to_stop(self) -> list[bool]:
        return [self.fault is not None, self.preemption.asked, self.preemption.interrupted]

    def _decide(self, faults: float, asked: float, interrupted: float) -> bool:
        self.has_fault = faults > 0
        self.stopping, self.interrupted = faults + asked > 0, interrupted > 0
        return self.stopping

    def _too_many_skipped(self) -> str:
        return (
            f"--on_bad_sample skip has left out {counted(sum(self._skipped), 'sample')} within "
            f"{counted(len(self._skipped), 'step')}, more than --max_skipped_share allows; skipped.jsonl lists them. "
            "Is the image folder still there? If they may be left out, raise --max_skipped_share."
        )

    def raise_fault(self) -> None:
        """Raise on every rank what has failed on any, if anything has. All ranks must call it."""
        faults = gather_from_ranks(self.accelerator, None if self.fault is None else str(self.fault))
        if self.fault is not None:
            raise self.fault
        for rank, sentence in enumerate(faults):
            if sentence is not None:
                raise DataFault(sentence if rank == 0 else f"rank {rank}: {sentence}")
