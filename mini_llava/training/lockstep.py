"""What all ranks agree on while a step runs: its trained tokens, and whether the run ends after it, and why.

A rank that has no data cannot leave the others alone in a collective: the run would die with all that it has learned
since the last checkpoint. So each rank waits for the data of the step after the one that it is about to take, and what
went wrong there (a bad record, a worker that was killed or hangs) is known, by the all-reduce that a step begins with
anyway, to all of them: they take one more step together, save, and end. LLaVA has nothing of the kind.
"""

from collections import deque
from collections.abc import Iterator

import torch
from accelerate import Accelerator

from ..data.loader import RankStep
from ..words import counted
from .backend import gather_from_ranks, sum_over_ranks

STEPS_LOOKED_AT = 10  # whose skipped samples count against `--max_skipped_share`


class DataFault(OSError):
    """Why the data ends a run, in one sentence."""


class Lockstep:
    """
    Attributes:
        trained_tokens: of the global batch that was yielded last, fp64 on the device.
        samples: in that global batch; without any there is no step to take.
        stopping: whether the run ends here; the same on all ranks.
        interrupted: whether it does because a person pressed Ctrl-C.
        fault: why this rank cannot go on.
        ahead: this rank's data of the step after the one that was yielded last.
    """

    def __init__(self, accelerator: Accelerator, preemption, max_skipped: float):
        """
        Args:
            preemption: knows whether this rank was `asked` to stop, and whether it was `interrupted` by Ctrl-C.
            max_skipped: samples a step, on average over `STEPS_LOOKED_AT` steps; when more are skipped the run ends.
        """
        self.accelerator, self.preemption, self.max_skipped = accelerator, preemption, max_skipped * STEPS_LOOKED_AT
        self.trained_tokens = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self.samples = self._samples_ahead = 0
        self.stopping = self.interrupted = False
        self._sums, self._copied = torch.zeros(5, dtype=torch.float64), None
        self.fault: Exception | None = None
        self._skipped: deque[int] = deque(maxlen=STEPS_LOOKED_AT)
        self.ahead: RankStep | None = None

    def steps(self, loader: Iterator[RankStep]) -> Iterator[RankStep]:
        """Yield this rank's steps. `read` says afterwards whether the run ends after the step.

        loader: yields them; may raise what makes a step impossible, and end early when the run was asked to stop.
        """
        self._look_ahead(loader)
        self._begin_to_agree(0)
        self.read()  # the one time that the host waits for it
        while self.ahead is not None and not self.stopping:
            work, self.samples = self.ahead, self._samples_ahead
            self._look_ahead(loader)
            self._begin_to_agree(sum(work.trained_tokens))
            yield work

    def _look_ahead(self, loader: Iterator[RankStep]) -> None:
        try:
            self.ahead = next(loader, None)
        except Exception as error:  # a bug in a loader's worker, too, shall not cost what was trained
            self.ahead, self.fault = None, error

    def _begin_to_agree(self, trained_tokens: int) -> None:
        ahead = self.ahead or RankStep([], [])
        sums = sum_over_ranks(
            self.accelerator, [trained_tokens, ahead.samples, len(ahead.skipped), *self._reasons_to_stop()]
        )
        self.trained_tokens, self._sums = sums[0], sums[1:].to("cpu", non_blocking=True)
        if sums.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> bool:
        """Return whether the run ends after this step, once the device has come past its beginning."""
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
        """Return whether the run ends here, because of a fault that all ranks have found themselves; None goes on."""
        if fault is not None:
            self.fault, self.stopping, self.ahead = fault, True, None
        return self.stopping

    def _reasons_to_stop(self) -> list[bool]:
        return [self.fault is not None, self.preemption.asked, self.preemption.interrupted]

    def _decide(self, faults: float, asked: float, interrupted: float) -> bool:
        self.stopping, self.interrupted = faults + asked > 0, interrupted > 0
        return self.stopping

    def _too_many_skipped(self) -> str:
        return (
            f"--on_bad_sample skip has left out {counted(sum(self._skipped), 'sample')} within "
            f"{counted(len(self._skipped), 'step')}, more than --max_skipped_share allows; skipped.jsonl lists them. "
            "Is the image folder still there? If they may be left out, raise --max_skipped_share."
        )

    def raise_fault(self) -> None:
        """Raise on every rank what ended the run on one of them, if anything did. All ranks must call it."""
        faults = gather_from_ranks(self.accelerator, None if self.fault is None else str(self.fault))
        if self.fault is not None:
            raise self.fault
        for rank, sentence in enumerate(faults):
            if sentence is not None:
                raise DataFault(sentence if rank == 0 else f"rank {rank}: {sentence}")
