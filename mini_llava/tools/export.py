"""Writes a LLaVA model in another layout: `python -m mini_llava.tools.export DIR OUT --export_format llava`.

DIR is a whole model in any layout, a LoRA directory (with --merge or --adapters), a checkpoint or a projector. It runs
on the CPU. A whole model's weights stay in their files until they are written, one file of five gigabytes at a time;
the others are put together in memory.
"""

import argparse
import sys
from pathlib import Path

from ..arguments import ModelArguments, choices
from ..command_line import Parser
from ..errors import UserError
from ..formats.layouts import DTYPES, check_saved_place
from ..guards.early import check_place, refuse_at_once


def parse_arguments(command_line: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m mini_llava.tools.export", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add(
        "source", metavar="DIR", help="a LLaVA model (directory or hub name), or the directory of a trained part of one"
    )
    add("directory", metavar="OUT", type=Path, help="directory to write")
    add("--merge", action="store_true", help="DIR is a LoRA directory: add the adapters to the weights of its base")
    add(
        "--adapters",
        action="store_true",
        help="DIR is a LoRA directory: write its base in transformers' layout, projector included, and the adapters "
        "in OUT/adapter, where PEFT and vLLM can read them",
    )
    add("--export_format", choices=choices("export_format"), default="transformers")
    add("--dtype", choices=DTYPES, help="dtype of the weights [as stored]")
    add("--model_base", metavar="TEXT", help="base of a LoRA directory, checkpoint or projector [as DIR says]")
    add("--version", metavar="TEXT", help="conversation template [as DIR says]")
    add("--image_aspect_ratio", choices=choices("image_aspect_ratio"), help="[as DIR says]")
    add("--vision_tower", metavar="TEXT", help="name of the vision tower for LLaVA's layout, if DIR does not give it")
    add("--save_vision_tower", action="store_true", help="write the tower's weights in LLaVA's layout too")
    add("--overwrite", action="store_true", help="write into OUT even if it is not empty")
    return parser.parse_args(command_line)


def check_given(given: argparse.Namespace) -> None:
    """Raise OSError or UserError for what is wrong with DIR and OUT, as far as that shows without a model."""
    if given.adapters and (given.merge or given.export_format != "transformers"):
        raise UserError("--adapters leaves them beside a base in transformers' layout: no --merge, no --export_format.")
    check_empty(given.directory, given.overwrite)
    check_saved_place(given.source, given.model_base, given.vision_tower)


def check_empty(directory: Path, overwrite: bool) -> None:
    """Raises OSError if OUT is a file, cannot be written, or holds something and shall not be overwritten."""
    check_place(directory, "OUT")
    if not overwrite and directory.is_dir() and (found := sorted(path.name for path in directory.iterdir())):
        more = ", ..." if len(found) > 3 else ""
        raise FileExistsError(
            f"{directory} is not empty ({', '.join(found[:3])}{more}): take another OUT, or --overwrite, which "
            "replaces files of the same names."
        )


if __name__ == "__main__":  # before the imports below, which take seconds
    refuse_at_once("export", 1, check_given, parse_arguments())

import torch

from ..formats import write
from ..formats.read import map_llava
from ..guards.user_errors import USER_ERRORS
from ..options.lora import save_beside_base
from .saved_models import LORA, WHOLE, SavedModel, open_saved


def export(
    saved: SavedModel,
    directory: Path,
    export_format: str = "transformers",
    dtype: torch.dtype | None = None,
    image_aspect_ratio: str | None = None,
    save_vision_tower: bool = False,
    merged: bool = True,
) -> str:
    """Write the model; returns a line about it.

    Args:
        dtype: None keeps the one stored.
        image_aspect_ratio: what the images were trained with; None takes what the directory says.
        merged: whether adapters are added to their base; if not, both are written, side by side.

    Raises:
        UserError: the layout asked for has no place for the model.
    """
    trained_with = saved.image_aspect_ratio()
    if image_aspect_ratio != trained_with and "anyres" in (image_aspect_ratio, trained_with) and image_aspect_ratio:
        raise UserError(f"{saved.directory} was trained with --image_aspect_ratio {trained_with}: leave the flag out.")
    dtype = dtype or saved.stored_dtype()
    if saved.kind == WHOLE:
        model = map_llava(saved.source)
        model.use_im_start_end, model.use_im_patch_token = saved.image_tokens()
    else:
        model = saved.load(dtype, merged)
    description = write.Description(
        projector_type=saved.source.projector_type,
        vision_tower_name=saved.source.vision_tower,
        image_aspect_ratio=image_aspect_ratio or trained_with,
        model_max_length=saved.model_max_length(),
        version=saved.version,
        template=saved.template,
        tokenizer=saved.tokenizer,
        image_processor=saved.source.image_processor(),
        export_format=export_format,
        include_vision_tower=save_vision_tower or saved.tower_is_own,
        dtype=dtype,
    )
    return (write.save_whole_model if merged else save_beside_base)(directory, model, description)


def main(command_line: list[str] | None = None) -> None:
    given = parse_arguments(command_line)
    try:
        check_given(given)
        saved = open_saved(given.source, given.model_base, given.vision_tower, given.version)
        print(saved.describe())
        if (given.merge or given.adapters) != (saved.kind == LORA):
            advice = "--merge adds its adapters to its base, --adapters writes them beside it for PEFT and vLLM."
            if given.merge or given.adapters:
                advice = "There is nothing to merge." if given.merge else "It has no adapters."
            raise UserError(f"{given.source} is a {saved.kind}. {advice}")
        for base in (given.source, saved.source.name):
            flags = ModelArguments(model_name_or_path=base, vision_tower=saved.source.vision_tower)
            write.check_may_be_written(given.directory, flags, given.export_format, saved.source.vision_config)
        settings = (given.export_format, given.dtype and getattr(torch, given.dtype), given.image_aspect_ratio)
        print(export(saved, given.directory, *settings, given.save_vision_tower, not given.adapters))
    except USER_ERRORS as error:
        sys.exit(f"export: error: {error}")


if __name__ == "__main__":
    main()
