"""Every family of language models with every kind of vision tower: trained in both stages and as adapters, packed and
padded, on one process and partitioned on two; the results are whole and load with the logits they were trained to.
"""

import itertools
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mini_llava import build
from mini_llava.data.templates import CHAT_TEMPLATE
from mini_llava.data.tokenization import IMAGE_TOKEN_INDEX, tokenize_prompt
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.hub import read_json
from mini_llava.options.chat_template import find_template
from mini_llava.tools import export
from mini_llava.tools.saved_models import open_saved
from tests.end_to_end import runs
from tests.families import FAMILIES, write_family
from tests.launching import train_in_turn
from tests.model.tiny_towers import IMAGE_SIZE, KINDS, save_tower

TOWERS = tuple(KINDS)
STAGES = ("stage 1", "stage 2", "LoRA")
LAYOUTS = ("packed", "padded")
PICTURE = runs.FIXTURES / "data" / "images" / "square_rgb.png"


class Case(NamedTuple):
    family: str
    tower: str
    stage: str
    layout: str

    @property
    def name(self) -> str:
        return ", ".join(self)

    @property
    def version(self) -> str:
        """Stage 2 trains with the tokenizer's own template, adapters with the named one, where the family has it."""
        family = FAMILIES[self.family]
        if self.stage == "stage 1":
            return "plain"
        own, named = family.chat_template and CHAT_TEMPLATE, family.version
        return (own or named) if self.stage == "stage 2" else (named or own)


CASES = [
    Case(family, tower, STAGES[(row + column) % 3], LAYOUTS[(row // 3 + column) % 2])
    for row, family in enumerate(FAMILIES)
    for column, tower in enumerate(TOWERS)
]
# One of each family, in which towers, stages and layouts take turns.
PARTITIONED = [CASES[len(TOWERS) * row + row % len(TOWERS)] for row in range(len(FAMILIES))]
# No dropout, which differs between ranks; Adam's epsilon is large: a gradient of nearly zero is a step of nearly zero
# then, and not one by the sign of its rounding.
TWO_STEPS = dict(max_steps=2, global_batch_size=4, per_device_train_batch_size=2, warmup_ratio=0, save_strategy="no")
TWO_STEPS |= dict(learning_rate=1e-3, adam_epsilon=1e-4, model_max_length=512)
OF_STAGES = {"LoRA": dict(lora_enable=True, lora_r=4, lora_alpha=8, lora_dropout=0, mm_projector_lr=1e-3)}


def test_every_pair_of_values_is_in_some_case():
    values = (tuple(FAMILIES), TOWERS, STAGES, LAYOUTS)
    for one, other in itertools.combinations(range(4), 2):
        found = {(case[one], case[other]) for case in CASES}
        wanted = set(itertools.product(values[one], values[other]))
        assert found == wanted, wanted - found


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """The directories that the runs start from."""
    folder = tmp_path_factory.mktemp("parts")
    for name, family in FAMILIES.items():
        write_family(family, folder / name)
    for kind in TOWERS:
        save_tower(kind, folder / kind)
    return folder


def command_line(case: Case, parts: Path, output_dir: Path) -> list[str]:
    values = dict(model_name_or_path=parts / case.family, vision_tower=parts / case.tower, version=case.version)
    values |= dict(packing=case.layout == "packed") | TWO_STEPS | OF_STAGES.get(case.stage, {})
    return runs.flags_of(1 if case.stage == "stage 1" else 2, output_dir, values)


@pytest.fixture(scope="module")
def one_process(parts, tmp_path_factory):
    """`one_process(case)`: its output directory, and the logits of the model that was trained, while in memory."""
    folder, done = tmp_path_factory.mktemp("one process"), {}
    load = build.load_llava

    def get(case: Case) -> tuple[Path, torch.Tensor]:
        if case not in done:
            models = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(build, "load_llava", lambda *given: models.append(load(*given)) or models[-1])
                runs.train_here(command_line(case, parts, folder / case.name))
            done[case] = folder / case.name, logits(models[0].eval())
        return done[case]

    return get


@pytest.fixture(scope="module")
def two_processes(parts, tmp_path_factory) -> Path:
    """A folder with the output directories of the partitioned runs, all of one launch."""
    folder = tmp_path_factory.mktemp("zero3")
    command_lines = [command_line(case, parts, folder / case.name) for case in PARTITIONED]
    printed = train_in_turn(runs.config_file("zero3", folder), command_lines, folder)
    assert printed.count("2 processes, DeepSpeed ZeRO-3, fp32") == len(PARTITIONED), printed
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Of a sequence with an image, for the 700 tokens that all vocabularies have."""
    width = model.vision_tower.tokens_per_image
    ids = torch.arange(3, 23 + width)[None] * 7 % 700
    pixels = torch.linspace(-2, 2, 3 * IMAGE_SIZE**2).view(1, 3, IMAGE_SIZE, IMAGE_SIZE).sin()
    embeddings = model.embed(ids, pixels, torch.arange(5, 5 + width))
    return model.language_model(inputs_embeds=embeddings, use_cache=False).logits[..., :700]


@torch.no_grad()
def logits_of_transformers(model) -> torch.Tensor:
    """The same of transformers' own LLaVA."""
    width = model.config.image_seq_length
    ids = torch.arange(3, 23 + width)[None] * 7 % 700
    ids[:, 5 : 5 + width] = model.config.image_token_id
    pixels = torch.linspace(-2, 2, 3 * IMAGE_SIZE**2).view(1, 3, IMAGE_SIZE, IMAGE_SIZE).sin()
    return model.eval()(input_ids=ids, pixel_values=pixels).logits[..., :700]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_trains_and_its_result_reloads_with_the_same_logits(case, one_process, parts, tmp_path):
    run, trained = one_process(case)
    losses = [entry["loss"] for entry in runs.log(run)]
    assert len(losses) == 2 and all(2 < loss < 20 for loss in losses)
    assert trained.isfinite().all() and trained.std() > 0.1

    reloaded = open_saved(str(run)).load(torch.float32)
    # The same kernels; adapters are added to the weights they stood beside, which rounds.
    torch.testing.assert_close(logits(reloaded), trained, rtol=0, atol=1e-5)
    whole = run
    if case.stage != "stage 2":
        whole = tmp_path / "whole"
        merge = ["--merge"] if case.stage == "LoRA" else []
        export.main([str(run), str(whole), *merge, "--dtype", "float32", "--version", case.version])
    if case.family == "gemma_2" or case.tower == "dinov2_with_registers":  # transformers' LLaVA has no place for them
        assert read_json(whole, "config.json")["model_type"].startswith("llava_")
        found = logits(open_saved(str(whole), vision_tower=str(parts / case.tower)).load(torch.float32))
    else:
        assert read_json(whole, "config.json")["model_type"] == "llava"
        model, loading = LlavaForConditionalGeneration.from_pretrained(whole, output_loading_info=True)
        assert not any(loading.values()), loading
        found = logits_of_transformers(model)
        if case.stage != "stage 1":
            assert_processor_gives_the_training_prompt(whole, case, parts)
    # As above; and the product with the head has other sizes there.
    torch.testing.assert_close(found, trained, rtol=0, atol=1e-5)


def assert_processor_gives_the_training_prompt(whole: Path, case: Case, parts: Path) -> None:
    """That `apply_chat_template` of the exported processor asks as it was trained."""
    tokenizer, processor = load_tokenizer(parts / case.family), AutoProcessor.from_pretrained(whole)
    turns = ["<image>\nWhat is it?", "A cat.", "Sure?", ""]
    said = [{"from": ("human", "gpt")[number % 2], "value": turn} for number, turn in enumerate(turns)]
    record, template = {"image": "a.png", "conversations": said}, find_template(case.version, tokenizer)
    ids = tokenize_prompt(record, template, tokenizer, open_saved(str(whole)).load().vision_tower.tokens_per_image)
    ids[ids == IMAGE_TOKEN_INDEX] = processor.image_token_id
    picture = {"type": "image", "image": Image.open(PICTURE).convert("RGB")}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    about = dict(add_generation_prompt=True, tokenize=True, return_dict=True, date_string="26 Jul 2024")
    assert processor.apply_chat_template(messages, **about)["input_ids"][0] == ids.tolist()


def test_llavas_layout_keeps_the_chat_template_and_held_out_questions_are_asked_with_it(tmp_path, capsys):
    base = shutil.copytree(runs.FIXTURES / "llm", tmp_path / "base")  # with a tokenizer.model, which LLaVA's code reads
    (base / "chat_template.jinja").write_text(FAMILIES["llama_2"].chat_template, encoding="utf-8")
    held_out = dict(eval_data_path=runs.FIXTURES / "data" / "train_stage2.json", eval_max_samples=4)
    held_out |= dict(eval_image_folder=runs.FIXTURES / "data" / "images")
    values = dict(model_name_or_path=base, version=CHAT_TEMPLATE, export_format="llava") | TWO_STEPS | held_out
    runs.train_here(runs.flags_of(2, tmp_path / "run", values))
    assert "4 held-out questions after training: " in capsys.readouterr().out

    assert (tmp_path / "run" / "tokenizer.model").exists()
    saved, template = open_saved(str(tmp_path / "run")), find_template(CHAT_TEMPLATE, load_tokenizer(base))
    assert saved.version == CHAT_TEMPLATE and saved.template == template
    export.main([str(tmp_path / "run"), str(tmp_path / "transformers")])
    again = open_saved(str(tmp_path / "transformers"))
    for questions, answers in ((["Hi"], []), (["Hi", "And?"], ["Yes."])):
        expected = template.render(questions, answers, generation_prompt=True)
        assert saved.template.render(questions, answers, True) == expected
        assert again.template.render(questions, answers, True) == expected


@pytest.mark.slow
@pytest.mark.parametrize("case", PARTITIONED, ids=lambda case: case.name)
def test_partitioned_it_trains_to_the_same_model(case, one_process, two_processes):
    one, trained = one_process(case)
    two = two_processes / case.name
    for ours, theirs in zip(runs.log(two), runs.log(one), strict=True):
        # fp32 sums in another order, here and in the gradients that the second loss has seen.
        assert math.isclose(ours["loss"], theirs["loss"], rel_tol=1e-5)
        assert math.isclose(ours["gradient_norm"], theirs["gradient_norm"], rel_tol=1e-4)
    torch.testing.assert_close(logits(open_saved(str(two)).load(torch.float32)), trained, rtol=0, atol=1e-3)
