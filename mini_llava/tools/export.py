"""Writes a LLaVA model in another layout: `python -m mini_llava.tools.export DIR OUT --export_format llava`.

DIR is anything that `train.py --model_name_or_path` takes for a LLaVA model. It runs on the CPU and in little memory:
weights stay in their files until they are written, one file of five gigabytes at a time.
"""

import argparse
import sys
from pathlib import Path

import torch

from ..arguments import KNOWN_VALUES, ModelArguments
from ..data.templates import get_template
from ..data.tokenization import load_tokenizer
from ..model import formats
from ..model.llava import LlavaModel
from ..model.sources import Source, map_parts, open_source

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export(
    source: Source,
    directory: Path,
    export_format: str = "transformers",
    dtype: torch.dtype | None = None,
    version: str = "v1",
    image_aspect_ratio: str | None = None,
    save_vision_tower: bool = False,
) -> str:
    """Write the model; returns a line about it.

    Args:
        dtype: None keeps the one stored.
        version: name of the conversation template that the model was trained with.
        image_aspect_ratio: what the images were trained with; None takes what the source says.

    Raises:
        ValueError: the source is no LLaVA model, or the layout asked for has no place for it.
    """
    model = LlavaModel(*map_parts(source))
    tokenizer = load_tokenizer(source.name)
    described = dict(
        model=model,
        projector_type=source.projector_type,
        vision_tower_name=source.vision_tower,
        image_aspect_ratio=image_aspect_ratio or source.image_aspect_ratio(),
        model_max_length=source.model_max_length(tokenizer),
        version=version,
    )
    return formats.save_whole_model(
        directory,
        tokenizer,
        source.image_processor(),
        get_template(version),
        export_format,
        save_vision_tower or "vision_tower" in source.stored,
        dtype or next(iter(source.stored["language_model"].values())).tensor.dtype,
        **described,
    )


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mini_llava.tools.export", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("source", metavar="DIR", help="a LLaVA model, directory or hub name, in either layout")
    add("directory", metavar="OUT", type=Path, help="where the new one is written")
    add("--export_format", choices=KNOWN_VALUES["export_format"], default="transformers")
    add("--dtype", choices=DTYPES, help="of the weights [as stored]")
    add("--version", metavar="TEXT", help="conversation template [as DIR says]")
    add("--image_aspect_ratio", choices=KNOWN_VALUES["image_aspect_ratio"], help="pad or square [as DIR says]")
    add("--vision_tower", metavar="TEXT", help="name of the tower, for LLaVA's layout, where DIR does not say it")
    add("--save_vision_tower", action="store_true", help="the tower's weights too, in LLaVA's layout")
    given = parser.parse_args(command_line)

    model_flags = ModelArguments(model_name_or_path=given.source, vision_tower=given.vision_tower)
    try:
        source = open_source(model_flags, {"vision_tower"} if given.vision_tower else ())
        print(source.describe())
        formats.check_may_be_written(given.directory, model_flags, given.export_format)
        if not (version := given.version or source.config.get("conversation_version")):
            version = "v1"
            print("It does not say which conversation template it was trained with: taken is LLaVA-1.5's (--version).")
        what = (given.export_format, given.dtype and DTYPES[given.dtype], version, given.image_aspect_ratio)
        print(export(source, given.directory, *what, given.save_vision_tower))
    except (ValueError, OSError) as error:
        sys.exit(f"export: error: {error}")


if __name__ == "__main__":
    main()
