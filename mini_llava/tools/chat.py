"""Chat with a trained model: `python -m mini_llava.tools.chat DIR [--image FILE ...] [--prompt TEXT]`.

Replaces LLaVA's `serve/cli.py`, which guesses template and loader from the folder's name. DIR is a whole model in
either layout, a LoRA directory, a checkpoint or a projector. Prompts and pixels are made as in training; the answers
are those of transformers' `generate` for the exported model.
"""

import argparse
import contextlib
import os
import sys
import warnings
from pathlib import Path

from ..command_line import Parser
from ..formats.layouts import DTYPES, check_saved_place
from ..guards.early import refuse_at_once


def parse_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m mini_llava.tools.chat", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("directory", metavar="DIR", help="model, LoRA directory, checkpoint or projector; a hub name for a whole model")
    add("--image", metavar="FILE", nargs="+", default=[], help="images for the first question")
    add("--prompt", metavar="TEXT", help="ask this, print the answer and exit [read questions from the terminal]")
    add("--model_base", metavar="TEXT", help="base of a LoRA directory, checkpoint or projector [as DIR says]")
    add("--vision_tower", metavar="TEXT", help="place of the vision tower [as DIR says]")
    add("--version", metavar="TEXT", help="conversation template [as DIR says]")
    add("--temperature", type=float, default=0.0, help="sampling temperature; 0 takes the likeliest token [0]")
    add("--top_p", type=float, default=1.0, help="sample from the likeliest tokens with this total probability [1]")
    add("--max_new_tokens", type=int, default=512, help="longest answer in tokens [512]")
    add("--device", help="device to run on [cuda if there is one, else cpu]")
    add("--dtype", choices=DTYPES, help="dtype of the weights [bfloat16 on a GPU, float32 on a CPU]")
    given = parser.parse_args(command_line)
    if given.top_p != 1 and not given.temperature:
        parser.error(f"--top_p {given.top_p} does nothing without --temperature.")
    return given


if __name__ == "__main__":  # before the imports below, which take seconds
    given = parse_arguments()
    refuse_at_once("chat", 1, check_saved_place, given.directory, given.model_base, given.vision_tower)

import torch
from transformers import GenerationConfig, TextStreamer
from transformers.utils import logging

from ..data.images import ImageReader
from ..data.templates import IMAGE_MARK, BadRecord, written_answer
from ..data.tokenization import tokenize_prompt
from ..evaluation.generate import expand_prompt, generate
from ..formats.write import generation_settings
from ..guards.user_errors import USER_ERRORS
from ..image_files import BadImage, load_image
from .saved_models import SavedModel, open_saved

COMMANDS = "/image FILE adds a picture to the next question, /reset begins anew, exit or Ctrl-D ends."


class Conversation:
    """A model, with the questions, answers and images so far."""

    def __init__(self, saved: SavedModel, dtype: torch.dtype, device: str, generation: dict):
        """Load the model. `generation` has settings for `GenerationConfig`: `max_new_tokens`, `do_sample` and so on."""
        self.template, self.tokenizer = saved.template, saved.tokenizer
        self.model, self.device = saved.load(dtype).to(device), device
        self.longest = saved.source.language_config.max_position_embeddings
        tower, processor = self.model.vision_tower, saved.source.image_processor()
        of_tower = (tower.image_size, self.model.tiling)
        self.image_reader = ImageReader(tower.tokens_per_image, processor, saved.image_aspect_ratio(), *of_tower)
        config = self.model.language_model.generation_config
        ends = generation_settings(config, self.tokenizer, self.template.stop).get("eos_token_id")
        generation = {**generation, "eos_token_id": ends, "pad_token_id": self.tokenizer.pad_token_id or 0}
        self.model.language_model.generation_config = GenerationConfig(**generation)
        # End marks that are text and no tokens, such as Vicuna's old ###.
        self.stop_strings = [mark for mark in self.template.stop if mark not in self.tokenizer.added_tokens_encoder]
        self.reset()

    def reset(self) -> None:
        """Forget all questions, answers and images."""
        self.turns, self.images, self.pending = [], [], []

    def add_image(self, file: str) -> None:
        """Add an image file to the next question. Raises BadImage."""
        path = Path(os.path.realpath(os.path.expanduser(file)))
        self.pending.append(load_image(path.parent, path.name))

    @torch.inference_mode()
    def ask(self, question: str, stream: bool = False) -> str:
        """Return the answer, printed while it is generated if `stream`; a failure leaves the conversation unchanged.

        Images come first in their turn, unless the question has marks for them. A conversation with several images
        counts as a record with several, so an image that was alone before may now be shown in another way.

        Raises:
            BadImage: an image cannot be padded.
            BadRecord: marks and images do not match, or the conversation is too long for the model.
        """
        if IMAGE_MARK not in question:
            question = (IMAGE_MARK + "\n") * len(self.pending) + question
        if self.template.captions_only:  # such a model knows one image and no turns
            self.turns, self.images = [], []
        turns, images = [*self.turns, question], self.images + self.pending
        # The prompt has no last answer: it is to be generated.
        spoken = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate([*turns, ""])]
        record = {"conversations": spoken, "image": [f"picture {index}" for index in range(len(images))]}
        pictures = [self.image_reader.prepare(image, several=len(images) > 1) for image in images]
        ids = expand_prompt(tokenize_prompt(record, self.template, self.tokenizer), pictures)
        if len(ids) >= self.longest:
            raise BadRecord(f"the conversation has {len(ids)} tokens, and the model takes {self.longest}: /reset.")
        settings = self.model.language_model.generation_config
        output = generate(
            self.model,
            [ids],
            pictures,
            self.device,
            max_new_tokens=min(settings.max_new_tokens, self.longest - len(ids)),
            use_cache=True,
            stop_strings=self.stop_strings or None,
            tokenizer=self.tokenizer,
            streamer=Printer(self) if stream else None,
        )
        answer = written_answer(self.template, self.tokenizer.decode(output[0], skip_special_tokens=True))
        self.turns, self.images, self.pending = [*turns, answer], images, []
        return answer


class Printer(TextStreamer):
    """Prints complete words of an answer, without its end mark and what the template puts before it."""

    def __init__(self, conversation: Conversation):
        super().__init__(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.template, self.text, self.printed = conversation.template, "", 0

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if not stream_end and self.template.answer_lead.strip().startswith(self.text.strip()):
            return
        answer = written_answer(self.template, self.text)
        print(answer[self.printed :], end="\n" if stream_end else "", flush=True)
        self.printed = len(answer)


def converse(conversation: Conversation) -> None:
    """Answer questions from the terminal; one that cannot be asked is reported and forgotten."""
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        command, _, rest = line.partition(" ")
        if line == "exit":
            return
        try:
            if command == "/image":
                conversation.add_image(rest.strip())
            elif command == "/reset":
                conversation.reset()
            elif command.startswith("/"):
                print(f"There is no {command}. {COMMANDS}", file=sys.stderr)
            elif line or conversation.pending:
                conversation.ask(line, stream=True)
        except (BadRecord, BadImage) as error:
            print(f"Not asked: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\nInterrupted; the question is forgotten.", file=sys.stderr)


def main(command_line: list[str] | None = None) -> None:
    given = parse_arguments(command_line)
    sampling = dict(do_sample=True, temperature=given.temperature, top_p=given.top_p, top_k=0)
    generation = {**(sampling if given.temperature else {}), "max_new_tokens": given.max_new_tokens}
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, given.dtype or ("float32" if device == "cpu" else "bfloat16"))
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # remarks on configurations, for whoever writes them
    warnings.simplefilter("ignore", FutureWarning)
    try:
        saved = open_saved(given.directory, given.model_base, given.vision_tower, given.version)
        print(saved.describe(), file=sys.stderr)
        conversation = Conversation(saved, dtype, device, generation)
        for file in given.image:
            conversation.add_image(file)
        if given.prompt is not None:
            print(conversation.ask(given.prompt))
            return
        print(f"Template {saved.version}, {dtype} on {device}. {COMMANDS}", file=sys.stderr)
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (arrow keys in input())
        converse(conversation)
    except USER_ERRORS as error:
        sys.exit(f"chat: error: {error}")


if __name__ == "__main__":
    main()
