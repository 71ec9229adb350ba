"""What happens to a record, from its JSON to the gradients: `python -m mini_llava.tools.tour`, with train.py's flags.

Without flags the records are the embedded demo's. Every tensor shown is made by the function named beside it, the one
that `train.py` calls; what is inside the model is seen by hooks on a forward pass of it. Nothing is written but the
demo's data, and no weight is changed.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from .. import arguments as flags
from .. import demo
from ..command_line import Parser
from ..guards.early import check_files, refuse_at_once


def parse_arguments(command_line: list[str] | None = None) -> tuple[argparse.Namespace, flags.Arguments]:
    """Return the flags that say what to show, and all others, which are train.py's."""
    parser = Parser(
        prog="python -m mini_llava.tools.tour",
        description="Shows what happens to records from JSON to gradients. All other flags are those of train.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--record", type=int, nargs="+", metavar="N", help="records to show, counted from 0 [two]")
    given, words = parser.parse_known_args(command_line)
    # The demo pads its rows on the CPU; packed they show more. A --packing among the words wins, being later.
    return given, flags.parse_for_a_tool(["--packing", "True", *words], "tour", vars(given))


if __name__ == "__main__":  # before the imports below, which take seconds
    refuse_at_once("tour", 2, check_files, parse_arguments()[1])

import torch

from ..build import build_model
from ..data.collator import collate
from ..data.images import ImageReader, normalise
from ..data.loader import RankSteps
from ..data.records import RecordStore
from ..data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, NO_IMAGE, read_conversation, template_for, tokenize
from ..errors import UserError
from ..formats.read import open_source
from ..guards.user_errors import USER_ERRORS
from ..image_files import image_path, load_image
from ..inputs import open_samples
from ..model.llava import LlavaModel, token_losses
from ..model.projector import build_projector
from ..model.trained import apply_plan
from ..model.vision_tower import VisionTower
from ..training import backend
from ..words import counted


def tour(arguments: flags.Arguments, records: list[int] | None) -> None:
    """Print all steps for the records of these numbers, or for the first one with an image and the one behind it.

    Raises:
        UserError: as `train.py` does, with sentences.
    """
    # --- As train.py sets up -----------------------------------------------------------------------------------------
    if arguments.is_demo:
        arguments, note = demo.prepare_run(arguments)
        print(note)
    check_files(arguments)
    source = open_source(arguments.model, arguments.explicit, arguments.data)
    arguments = arguments.fixed_by(source)
    data_flags, training = arguments.data, arguments.training
    samples = open_samples(arguments, source)
    store, tokenizer, template = samples.store, samples.tokenizer, samples.template
    if records is None:
        first = next((number for number in range(len(store)) if store[number].get("image") not in NO_IMAGE), 0)
        records = [number for number in (first, first + 1) if number < len(store)]
    if wrong := [number for number in records if not 0 <= number < len(store)]:
        raise UserError(f"--record {wrong[0]}: the data have {counted(len(store), 'record')}, counted from 0.")
    precision = backend.choose_precision(training.bf16, training.fp16, arguments.explicit)
    accelerator = backend.build_accelerator(precision, 1.0, "none", Path(training.output_dir))
    torch.manual_seed(training.seed)
    model, plan = build_model(arguments, source, tokenizer, samples.new_tokens, accelerator)
    model.to(accelerator.device).train()
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False)

    # --- One record --------------------------------------------------------------------------------------------------
    index = records[0]
    record, folder = store[index], store.image_folder(index)
    step(1, RecordStore.__getitem__, "a record of the data file, as LLaVA writes it")
    print(f"  {store.describe(index)}\n  {json.dumps(record, ensure_ascii=False)}")

    step(
        2,
        type(template).render,
        f"the text that the template {template.name} makes of it, in pieces that are trained (>) or not",
    )
    questions, answers, _ = read_conversation(samples.record(index), template)
    for text, trained in template_for(samples.record(index), template).render(questions, answers):
        print(f"  {'>' if trained else ' '} {text!r}")

    step(3, tokenize, "ids, with a place for each token of an image, and labels, -100 where nothing is trained")
    sample = samples.tokenize(index)
    show("input_ids", torch.from_numpy(sample.input_ids))
    show("labels", torch.from_numpy(sample.labels))
    trained = sample.labels != IGNORE_INDEX
    print(
        f"  {counted(len(trained), 'token')}, {(sample.input_ids == IMAGE_TOKEN_INDEX).sum()} of them of images, "
        f"{trained.sum()} trained: {decode(sample.labels[trained])!r}"
    )

    for name in sample.images[:1]:
        step(4, ImageReader.open, f"its image, {data_flags.image_aspect_ratio}, resized and kept as bytes")
        image = load_image(folder, name)
        print(f"  {name}: {Path(image_path(folder, name)).stat().st_size:,} bytes, {image.width}x{image.height} pixels")
        show("pixels", samples.image_reader.open(folder, name, sample.several).pixels)

    # --- A micro-batch -----------------------------------------------------------------------------------------------
    layout = "concatenated, delimited by cu_seqlens" if data_flags.packing else "padded to the longest"
    step(5, collate, f"a micro-batch of record{'s' * (len(records) > 1)} {', '.join(map(str, records))}, {layout}")
    work = RankSteps(samples, data_flags.packing)[[records]]
    if work.fault is not None:
        raise work.fault
    [batch] = work.micro_batches
    for name, value in batch.items():
        if value is not None:
            show(name, value) if torch.is_tensor(value) else print(f"  {name:16} {value}")

    # --- The model ---------------------------------------------------------------------------------------------------
    seen = {}
    inside = {"features": model.vision_tower, "projected": model.projector}
    inside["words"] = model.language_model.get_input_embeddings()
    for name, module in inside.items():
        module.register_forward_hook(lambda _module, _given, made, name=name: seen.update({name: made}))
    model.language_model.register_forward_hook(
        lambda _module, _given, given, made: seen.update(inputs=given["inputs_embeds"], logits=made.logits),
        with_kwargs=True,
    )
    batch = backend.to_device(batch, accelerator.device)
    loss, losses = forward_and_backward(model, accelerator, batch, work.trained_tokens[0])

    step(6, VisionTower.forward, "the bytes become floats, on the device, and the tower makes features of them")
    if batch["pixel_values"].dtype == torch.uint8:
        show("pixel_values", normalise(batch["pixel_values"], model.vision_tower.pixel_table))
    show("features", seen["features"])
    step(7, build_projector, "the projector, which makes them as wide as the embeddings of words")
    show("projected", seen["projected"])
    step(8, LlavaModel.embed, "they take their places among the embeddings")
    show("words", seen["words"])
    show("inputs_embeds", seen["inputs"])
    step(9, LlavaModel.forward, "the language model computes logits where a token is to be predicted")
    show("logits", seen["logits"])

    step(10, token_losses, "what each trained token costs; their sum, divided by their number, is the loss")
    show("losses", losses)
    print("  to predict        loss  chance  likeliest")
    rows = (batch["targets"].flatten(), losses.flatten(), seen["logits"].flatten(0, 1).argmax(-1))
    of_trained = batch["targets"].flatten() != IGNORE_INDEX
    for target, lost, best in list(zip(*(row[of_trained].tolist() for row in rows), strict=True))[:8]:
        token, likeliest = (repr(tokenizer.convert_ids_to_tokens(number)) for number in (target, best))
        print(f"  {token:14} {lost + 0.0:7.3f} {math.exp(-lost):7.1%}  {likeliest}")
    print(f"  loss {loss:.4f} = {losses.sum():.4f} / {counted(work.trained_tokens[0], 'token')}")

    # --- The gradients -----------------------------------------------------------------------------------------------
    step(11, apply_plan, "which parts get gradients in backward, here their norms, in this stage and in the other")
    norms = {f"stage {arguments.stage}": gradient_norms(model)}
    frozen = {"vision_tower"} if plan["language_model"] == "frozen" else {"vision_tower", "language_model"}
    model.zero_grad(set_to_none=True)
    apply_plan(model, {part: "frozen" if part in frozen else "full" for part, _ in model.named_children()})
    forward_and_backward(model, accelerator, batch, work.trained_tokens[0])
    norms[f"stage {3 - arguments.stage}"] = gradient_norms(model)
    print(f"  {'part':16}" + "".join(f"{name:>14}" for name in norms))
    for part, _ in model.named_children():
        values = (by_part[part] for by_part in norms.values())
        print(f"  {part:16}" + "".join(f"{'none' if value is None else f'{value:.4f}':>14}" for value in values))
    print("  A frozen language model passes the loss on: the projector's gradient is the same in both stages.")


def forward_and_backward(
    model: LlavaModel, accelerator, batch: dict, trained_tokens: int
) -> tuple[float, torch.Tensor]:
    """Return loss and token losses, fp32 [B, K], with gradients as in a step whose global batch is this micro-batch."""
    with accelerator.autocast():
        losses = model(**batch, reduction="none")
    loss = losses.sum() / trained_tokens
    loss.backward()
    return loss.item(), losses.detach()


def gradient_norms(model: LlavaModel) -> dict[str, float | None]:
    """Return the gradient norm of each part of the model; None where it has no gradient."""
    norms = {}
    for part, module in model.named_children():
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        norms[part] = float(torch.nn.utils.get_total_norm(gradients)) if gradients else None
    return norms


def step(number: int, function: Callable, sentence: str) -> None:
    file = function.__module__.removeprefix("mini_llava.").replace(".", "/")
    print(f"\n{number}. {function.__qualname__} ({file}.py): {sentence}")


def show(name: str, tensor: torch.Tensor) -> None:
    """Return name, kind, shape and range of a tensor, and its first values."""
    tensor = tensor.detach().cpu()
    numbers = tensor.flatten()[:6].tolist()
    values = " ".join(f"{number:.3g}" if tensor.is_floating_point() else f"{number:d}" for number in numbers)
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    span = f"{tensor.min().item():.4g} to {tensor.max().item():.4g}" if tensor.numel() else "empty"
    more = " ..." if tensor.numel() > len(numbers) else ""
    print(f"  {name:16} {kind:26} {span:18} {values}{more}")


def main(command_line: list[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal need not know every character
    given, arguments = parse_arguments(command_line)
    try:
        tour(arguments, given.record)
    except USER_ERRORS as error:
        print(f"tour: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
