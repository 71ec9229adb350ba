"""The data of a run: its records, what is made of each, how long they are, and the held-out questions.

Read and measured before the process group exists: NCCL gives up after ten minutes of waiting for one rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .arguments import Arguments
from .data.loader import RankSteps, refuse_or_report
from .data.records import Lengths, RecordStore, measure
from .evaluation.evaluate import Question, read_held_out
from .formats.read import Source
from .inputs import Inputs, choose_inputs


@dataclass
class Data:
    """
    Attributes:
        inputs: what is made of a record and of a picture.
        lengths: of each record, exact.
        steps: maps the records of a rank's micro-batches to what it computes in a step.
        held_out: the questions of `--eval_data_path` with their records; None without the flag.
    """

    inputs: Inputs
    store: RecordStore
    lengths: Lengths
    steps: RankSteps
    held_out: tuple[RankSteps, list[Question]] | None

    @property
    def longest_held_out(self) -> int:
        """Tokens of the longest held-out record; 0 without any."""
        return max((question.tokens for question in self.held_out[1]), default=0) if self.held_out else 0


def read_data(arguments: Arguments, source: Source, say: Callable[[str], None]) -> Data:
    """Read and measure what the run is trained on and what is held out.

    Raises:
        BadRecord: with all faults of the records, unless `--on_bad_sample skip` leaves them out.
    """
    flags, cache = arguments.data, Path(arguments.training.output_dir) / "cache"
    inputs = choose_inputs(arguments, source)
    store = RecordStore(flags.data_path, flags.image_folder, flags.exclude, cache)
    workers = max(1, flags.dataloader_num_workers)
    lengths = measure(store, inputs.to_sample, workers, cache, inputs.measurement_key, inputs.tiling)
    for line in refuse_or_report(store, lengths.bad, flags.on_bad_sample):
        say(f"skipped: {line}")
    steps = RankSteps(store, inputs.to_sample, inputs.to_pixels, inputs.image_size, flags.packing, flags.on_bad_sample)
    held_out = read_held_out(
        flags, arguments.training.seed, inputs.to_eval_sample, inputs.to_prompt, inputs.to_pixels, inputs.image_size
    )
    return Data(inputs, store, lengths, steps, held_out)
