"""The data of a run: its samples, how long they are, and the held-out questions.

Read and measured before the process group exists: NCCL gives up after ten minutes of waiting for one rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .arguments import Arguments
from .data.lengths import Lengths, measure
from .data.loader import RankSteps
from .data.samples import Samples
from .evaluation.questions import Question, read_questions
from .formats.read import Source
from .inputs import open_held_out, open_samples
from .watch.skipped import refuse_or_report


@dataclass
class Data:
    """
    Attributes:
        lengths: of each sample, exact.
        rank_steps: maps the records of a rank's micro-batches to what it computes in a step.
        held_out: the samples of `--eval_data_path`, None without the flag.
        questions: what is asked about them.
    """

    samples: Samples
    lengths: Lengths
    rank_steps: RankSteps
    held_out: Samples | None
    questions: list[Question]

    @property
    def longest_held_out(self) -> int:
        """Tokens of the longest held-out record; 0 without any."""
        return max((question.tokens for question in self.questions), default=0)


def read_data(arguments: Arguments, source: Source, log: Callable[[str], None]) -> Data:
    """Read and measure what the run is trained on and what is held out.

    Raises:
        BadRecord: with all faults of the records, unless `--on_bad_sample skip` leaves them out.
    """
    flags, cache = arguments.data, Path(arguments.training.output_dir) / "cache"
    samples = open_samples(arguments, source, cache)
    held_out = open_held_out(arguments, samples)
    lengths = measure(samples, max(1, flags.dataloader_num_workers), cache)
    for line in refuse_or_report(samples.store, lengths.bad, flags.on_bad_sample):
        log(f"skipped: {line}")
    questions = read_questions(held_out, flags.eval_max_samples, arguments.training.seed) if held_out else []
    return Data(samples, lengths, RankSteps(samples, flags.packing, flags.on_bad_sample), held_out, questions)
