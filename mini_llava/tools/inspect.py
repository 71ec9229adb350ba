"""Shows samples as they will be trained on: `python -m mini_llava.tools.inspect --stage 2 --config my_run.yaml`.

Takes the flags of train.py, so that the same command line shows what it will train; without any, the embedded demo's.
Trained tokens are coloured, placeholders of images folded. LLaVA has nothing like it: what it masks is known only to
those who print its tensors. Everything shown comes from the functions that the trainer itself calls.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence

from .. import arguments as flags
from .. import demo
from ..command_line import Parser
from ..errors import UserError
from ..guards.early import check_files, refuse_at_once


def parse_arguments(command_line: Sequence[str] | None = None) -> tuple[argparse.Namespace, flags.Arguments]:
    """Return the flags that say what to show, and all others, which are train.py's."""
    parser = Parser(
        prog="python -m mini_llava.tools.inspect",
        description=__doc__.split("\n\n")[0] + " All other flags are those of train.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="show the first N records [3]")
    parser.add_argument("--record", type=int, nargs="+", metavar="N", help="show these records instead, counted from 0")
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="colour the output [auto: in a terminal]"
    )
    given, of_train = parser.parse_known_args(command_line)
    return given, flags.parse_for_a_tool(of_train, "inspect", vars(given))


if __name__ == "__main__":  # before the imports below, which take seconds
    refuse_at_once("inspect", 2, check_files, parse_arguments()[1])

from ..data.samples import Samples
from ..data.templates import BadRecord
from ..data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from ..formats.read import open_source
from ..guards.user_errors import USER_ERRORS
from ..image_files import BadImage
from ..inputs import open_samples
from ..watch.spans import IMAGE, TRAINED, spans
from ..words import counted

COLOURS = {TRAINED: ("\033[1;32m", "\033[0m"), IMAGE: ("\033[36m", "\033[0m")}
MARKS = {TRAINED: ("[[", "]]")}
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def show(samples: Samples, index: int, marks: dict[str, tuple[str, str]]) -> str:
    """Return one record as text: its place, length and images, and its tokens between the marks of their kinds."""
    head = f"{samples.describe(index)}: "
    try:
        sample = samples.tokenize(index)
        if fault := samples.missing_image(index, sample.images):
            raise BadRecord(fault)
    except (BadRecord, BadImage) as error:
        return f"{head}cannot be trained on: {error}"
    of_images = int((sample.input_ids == IMAGE_TOKEN_INDEX).sum())
    trained = int((sample.labels != IGNORE_INDEX).sum())
    lines = [f"{head}{counted(len(sample.input_ids), 'token')}, {of_images:,} of images, {trained:,} trained"]
    lines += [f"image: {os.path.join(samples.store.image_folder(index), name)}" for name in sample.images]
    text = []
    for span in spans(sample, samples.tokenizer):
        begin, end = marks.get(span.kind, ("", ""))
        words = CONTROLS.sub(lambda found: repr(found[0])[1:-1], span.text)  # data must not steer the terminal
        words = words.replace("\n", "↵\n") if span.kind == TRAINED else words  # a newline is learned like a word
        # What is coloured ends with the line in some terminals and pagers: it begins anew on the next.
        text.append(begin + (words.replace("\n", f"{end}\n{begin}") if marks is COLOURS else words) + end)
    return "\n".join([*lines, "".join(text)])


def main(command_line: Sequence[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not know every character
    given, arguments = parse_arguments(command_line)
    in_colour = (
        sys.stdout.isatty() and "NO_COLOR" not in os.environ if given.color == "auto" else given.color == "always"
    )
    marks = COLOURS if in_colour else MARKS
    try:
        if arguments.is_demo:
            arguments, _ = demo.prepare_run(arguments)
        check_files(arguments)
        source = open_source(arguments.model, arguments.explicit, arguments.data)
        samples = open_samples(arguments.fixed_by(source), source)
        chosen = given.record or range(min(given.samples, len(samples)))
        if wrong := [index for index in chosen if not 0 <= index < len(samples)]:
            raise UserError(f"--record {wrong[0]}: the data have {counted(len(samples), 'record')}, counted from 0.")
        begin, end = marks[TRAINED]
        print(
            f"{counted(len(samples), 'record')}, template {arguments.model.version}; trained tokens look {begin}like "
            f"this{end}."
        )
        for index in chosen:
            print(f"\n{show(samples, index, marks)}")
    except USER_ERRORS as error:
        print(f"inspect: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
