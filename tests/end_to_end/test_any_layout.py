"""A run starts from every layout and ends in either, on one process and partitioned on two; nothing changes on the way.

Runs with a learning rate of zero take their step and must write what they read.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from mini_llava import build
from mini_llava.arguments import ModelArguments
from mini_llava.formats.read import load_llava, open_source
from mini_llava.tools import export
from mini_llava.tools.saved_models import open_saved
from tests.end_to_end import runs
from tests.launching import train_in_turn
from tests.model.test_sources import load_here, logits
from tests.published_layouts import CLIP, like_liuhaotian, like_llava_hf

PUBLISHED = {"liuhaotian": like_liuhaotian, "llava-hf": like_llava_hf}
ONE_STEP = {"max_steps": 1, "global_batch_size": 4, "warmup_ratio": 0, "save_strategy": "no", "version": "v1"}
STILL = {"learning_rate": 0, "allow": "learning_rate"}
TO_LLAVA = {"export_format": "llava", "vision_tower": CLIP}


def command_line(stage: int, base, output_dir, values: dict) -> list[str]:
    """Without `--vision_tower`, unless `values` has it."""
    words = runs.flags_of(stage, output_dir, {**ONE_STEP, "model_name_or_path": base, **values})
    if "vision_tower" not in values:
        place = words.index("--vision_tower")
        del words[place : place + 2]
    return words


def all_weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def parts(folder) -> dict[str, torch.Tensor]:
    """The weights of the model in a directory as this project holds them."""
    return load_here(folder).state_dict()


def assert_same(found: dict, expected: dict) -> None:
    """Of the rows of the embeddings those that all layouts have."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        rows = min(len(tensor), len(found[name])) if tensor.dim() else ...
        assert torch.equal(
            found[name][:rows] if tensor.dim() else found[name], tensor[:rows] if tensor.dim() else tensor
        ), name


def assert_transformers_agrees(folder, expected: torch.Tensor) -> None:
    """That `logits` are those of transformers' own class, which finds all of its tensors in the directory."""
    whole, loading = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    ids = torch.arange(3, 43)[None] * 7 % 800
    ids[:, 5:21] = whole.config.image_token_id
    pixels = torch.linspace(-2, 2, 3 * 56 * 56).view(1, 3, 56, 56).sin()
    with torch.no_grad():
        found = whole.eval()(input_ids=ids, pixel_values=pixels).logits[..., :800]
    # The kernels are the same; the product with the head may have other sizes.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.fixture
def kept(monkeypatch):
    """The models that runs in this process train, in turn."""
    models, load = [], build.load_llava

    def load_and_keep(*arguments):
        models.append(load(*arguments))
        return models[-1]

    monkeypatch.setattr(build, "load_llava", load_and_keep)
    return models


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_trains_a_step_and_ends_in_both_layouts(tmp_path, kept, name):
    base = PUBLISHED[name](tmp_path / "base")
    before = parts(base)
    learning = {"learning_rate": 1e-3, "unfreeze_mm_vision_tower": True}
    runs.train_here(command_line(2, base, tmp_path / "transformers", learning))
    model = kept[0].eval()
    assert not torch.equal(model.projector[0].weight, before["projector.0.weight"])
    to_llava = ["--export_format", "llava", "--vision_tower", str(CLIP)]
    export.main([str(tmp_path / "transformers"), str(tmp_path / "llava"), *to_llava])
    export.main([str(tmp_path / "llava"), str(tmp_path / "back")])
    runs.train_here(command_line(2, base, tmp_path / "at once", learning | TO_LLAVA))

    expected = logits(model)
    for folder in ("transformers", "llava", "back", "at once"):
        # The same weights in the same code.
        torch.testing.assert_close(logits(load_here(tmp_path / folder)), expected, rtol=0, atol=1e-6)
    assert any("vision_tower" in key for key in all_weights(tmp_path / "at once"))
    for folder in ("transformers", "back"):
        assert_transformers_agrees(tmp_path / folder, expected)


def test_a_frozen_tower_stays_outside_llavas_layout_unless_asked_for(tmp_path):
    base = like_liuhaotian(tmp_path / "base")
    for folder, words in (("without", {}), ("with", {"save_vision_tower": True})):
        runs.train_here(command_line(2, base, tmp_path / folder, {**STILL, **TO_LLAVA, **words}))
        inside = any("vision_tower" in key for key in all_weights(tmp_path / folder))
        assert inside == (folder == "with")
        assert_same(parts(tmp_path / folder), parts(base))


def test_a_projector_makes_the_round_trip_through_llavas_key_names(tmp_path, kept):
    base = like_liuhaotian(tmp_path / "base")
    runs.train_here(command_line(1, base, tmp_path / "stage1", {"learning_rate": 1e-2, "version": "plain"}))
    written = torch.load(tmp_path / "stage1" / "mm_projector.bin", weights_only=True)
    assert sorted(written) == [f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("bias", "weight")]
    trained = logits(kept[0].eval())
    assert (trained - logits(load_here(base))).abs().max() > 1e-3

    with_projector = {**STILL, "pretrain_mm_mlp_adapter": tmp_path / "stage1"}
    runs.train_here(command_line(2, base, tmp_path / "stage2", with_projector))
    torch.testing.assert_close(logits(load_here(tmp_path / "stage2")), trained, rtol=0, atol=1e-6)


def test_the_run_says_what_it_starts_from_and_records_what_it_fixes(tmp_path, capsys):
    base = like_llava_hf(tmp_path / "base")
    runs.train_here(command_line(2, base, tmp_path / "run", STILL))
    assert f"{base} is a LLaVA model in the layout of transformers" in capsys.readouterr().out
    recorded = (tmp_path / "run" / "arguments.yaml").read_text()
    assert "mm_projector_type: mlp2x_gelu" in recorded and "mm_vision_select_layer: -2" in recorded


def test_a_run_never_writes_over_what_it_starts_from(tmp_path):
    base = like_llava_hf(tmp_path / "base")
    before = sorted(file.name for file in base.iterdir())
    with pytest.raises(FileExistsError, match="which no run of this program wrote and this one would overwrite"):
        runs.train_here(command_line(2, base, base, STILL))
    assert sorted(file.name for file in base.iterdir()) == before


# --- partitioned -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory):
    """Output directories of runs on two processes under ZeRO-3, all of one launch."""
    folder = tmp_path_factory.mktemp("zero3")
    bases = {name: write(folder / name) for name, write in PUBLISHED.items()}
    with_tower = like_liuhaotian(folder / "with tower", "safetensors", with_tower=True)
    command_lines = [
        command_line(2, base, output_dir, STILL | values)
        for base, output_dir, values in (
            (bases["liuhaotian"], folder / "bin to transformers", {}),
            (folder / "bin to transformers", folder / "and to llava", TO_LLAVA),
            (folder / "and to llava", folder / "and back", {}),
            (bases["llava-hf"], folder / "llava-hf to llava", TO_LLAVA),
            (with_tower, folder / "bf16", {"bf16": True}),
        )
    ]
    learning = {"learning_rate": 1e-2, "version": "plain"}
    command_lines.append(command_line(1, bases["llava-hf"], folder / "stage1", learning))
    with_projector = {**STILL, "pretrain_mm_mlp_adapter": folder / "stage1"}
    command_lines.append(command_line(2, bases["llava-hf"], folder / "stage2", with_projector))
    of_lora = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "mm_projector_lr": 1e-2}
    of_lora |= {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "unfreeze_mm_vision_tower": True}
    command_lines.append(command_line(2, bases["llava-hf"], folder / "LoRA", of_lora))
    printed = train_in_turn(runs.config_file("zero3", folder), command_lines, folder)
    assert printed.count("2 processes, DeepSpeed ZeRO-3, fp32") == len(command_lines) - 1, printed
    assert "2 processes, DeepSpeed ZeRO-3, bf16" in printed
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bin to transformers", "and to llava", "and back", "llava-hf to llava"])
def test_a_partitioned_run_writes_the_weights_it_read(partitioned, name):
    base = partitioned / ("llava-hf" if "llava-hf" in name else "liuhaotian")
    assert_same(parts(partitioned / name), parts(base))
    torch.testing.assert_close(logits(load_here(partitioned / name)), logits(load_here(base)), rtol=0, atol=1e-6)
    if "to transformers" in name or name == "and back":
        LlavaForConditionalGeneration.from_pretrained(partitioned / name)


@pytest.mark.slow
def test_a_partitioned_run_in_bf16_rounds_the_weights_once(partitioned):
    found = {name: tensor.float() for name, tensor in parts(partitioned / "bf16").items()}
    source = open_source(ModelArguments(model_name_or_path=str(partitioned / "with tower")))
    expected = load_llava(
        source, "sdpa", dict.fromkeys(("language_model", "vision_tower", "projector"), torch.bfloat16)
    )
    assert_same(found, {name: tensor.float() for name, tensor in expected.state_dict().items()})
    assert json.loads((partitioned / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.slow
def test_a_partitioned_projector_makes_the_round_trip(partitioned):
    trained = torch.load(partitioned / "stage1" / "mm_projector.bin", weights_only=True)
    found = parts(partitioned / "stage2")
    for name, tensor in trained.items():
        assert torch.equal(found[name.replace("model.mm_projector", "projector")], tensor), name
    assert not torch.equal(found["projector.0.weight"], parts(partitioned / "llava-hf")["projector.0.weight"])


@pytest.mark.slow
def test_adapters_of_a_partitioned_run_on_a_llava_model_merge_into_one_of_transformers(partitioned, tmp_path):
    expected = logits(open_saved(str(partitioned / "LoRA")).load(torch.float32))
    assert (expected - logits(load_here(partitioned / "llava-hf"))).abs().max() > 1e-2
    export.main([str(partitioned / "LoRA" / "checkpoint-2"), str(tmp_path / "merged"), "--merge", "--dtype", "float32"])
    assert_transformers_agrees(tmp_path / "merged", expected)
