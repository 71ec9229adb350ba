"""A run starts from any layout that a LLaVA model is published in, and from nothing that is not whole."""

import json
import pickle
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, CLIPVisionModel
from transformers.utils import logging

from mini_llava.arguments import Arguments, DataArguments, ModelArguments, TrainingArguments
from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import tokenize
from mini_llava.formats.read import load_llava, map_llava, open_source, restore_rotary_frequencies
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.hub import short_bars_left_out
from mini_llava.model.llava import LlavaModel
from mini_llava.tools import export
from tests.published_layouts import CLIP, FIXTURES, edit_json, like_liuhaotian, like_llava_hf, llava_weights, write_json

FP32 = dict.fromkeys(("language_model", "vision_tower", "projector"), torch.float32)
LAYOUTS = {
    "LLaVA's, bin": lambda folder: like_liuhaotian(folder),
    "LLaVA's, safetensors with the tower": lambda folder: like_liuhaotian(folder, "safetensors", with_tower=True),
    "transformers 4's": lambda folder: like_llava_hf(folder),
    "transformers 5's": lambda folder: like_llava_hf(folder, "transformers 5"),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A directory of each layout, not to be changed."""
    folder = tmp_path_factory.mktemp("published")
    return {name: write(folder / str(number)) for number, (name, write) in enumerate(LAYOUTS.items())}


def open_here(folder, **given):
    return open_source(ModelArguments(model_name_or_path=str(folder), **given), given.keys())


def load_here(folder, **given) -> LlavaModel:
    return load_llava(open_here(folder, **given), "sdpa", FP32).eval()


@torch.no_grad()
def logits(model: LlavaModel) -> torch.Tensor:
    """Of a sequence with an image, for the 800 tokens that all layouts have."""
    ids = torch.arange(3, 43)[None] * 7 % 800
    pixels = torch.linspace(-2, 2, 3 * 56 * 56).view(1, 3, 56, 56).sin()
    embeddings = model.embed(ids, pixels, torch.arange(5, 21))
    return model.language_model(inputs_embeds=embeddings, use_cache=False).logits[..., :800]


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """Of the parts put together by hand."""
    weights = {name: tensor.float() for name, tensor in llava_weights().items()}
    source = open_here(
        FIXTURES / "llm", vision_tower=str(CLIP), mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2
    )
    model = load_llava(source, "sdpa", FP32).eval()
    start = {"language_model.": "", "projector.": "model.mm_projector."}
    tower = "model.vision_tower.vision_tower.vision_model."
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition(".")
        rest = rest.removeprefix("model.").removeprefix("vision_model.") if part == "vision_tower" else rest
        tensor.copy_(weights[start.get(part + ".", tower) + rest])
    return logits(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_loads_as_the_same_model(published, expected, layout):
    source = open_here(published[layout])
    assert (source.projector_type, source.select_layer, source.select_feature) == ("mlp2x_gelu", -2, "patch")
    torch.testing.assert_close(logits(load_here(published[layout])), expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_model_fixes_is_filled_into_the_flags(published, layout):
    flags = ModelArguments(model_name_or_path=str(published[layout]))
    assert (flags.mm_projector_type, flags.mm_vision_select_layer) == ("linear", -1)
    arguments = Arguments(2, flags, DataArguments(), TrainingArguments())
    fixed = arguments.fixed_by(open_source(flags)).model
    assert (fixed.mm_projector_type, fixed.mm_vision_select_layer) == ("mlp2x_gelu", -2)
    assert (flags.mm_projector_type, flags.mm_vision_select_layer) == ("linear", -1)  # as they were
    assert fixed.vision_tower == (str(CLIP) if "LLaVA" in layout else None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("record", [0, 1, 2, 3])
def test_the_ids_trained_are_those_of_llavas_own_tokenizer(published, layout, record):
    texts = [
        ["<image>\nWhat colour is it?", "Red, I think."],
        ["<image>", "It shows <pad> and </s>."],
        ["No image, but a <pad>  and   blanks.", " Well."],
        ["你好 <image>", "<unk>"],
    ][record]
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    example = {"image": ["x.png"] * texts[0].count("<image>"), "conversations": turns}
    ids = [
        tokenize(example, get_template("v1"), load_tokenizer(path), 16, 512).input_ids
        for path in (FIXTURES / "tokenizer_llama", published[layout])
    ]
    np.testing.assert_array_equal(*ids)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_written_from_it_and_back_give_the_same_logits(published, expected, layout, tmp_path):
    def written(source, name, *words):
        export.main([str(source), str(tmp_path / name), "--dtype", "float32", "--vision_tower", str(CLIP), *words])
        return tmp_path / name

    transformers = written(published[layout], "transformers")
    llava = written(transformers, "llava", "--export_format", "llava")
    back = written(llava, "back")
    direct = written(published[layout], "direct", "--export_format", "llava", "--save_vision_tower")
    for folder in (transformers, llava, back, direct):
        torch.testing.assert_close(logits(load_here(folder)), expected, rtol=0, atol=0)
    for file in ("model.safetensors", "generation_config.json", "preprocessor_config.json", "chat_template.jinja"):
        assert (transformers / file).read_bytes() == (back / file).read_bytes(), file

    whole, loading = AutoModelForImageTextToText.from_pretrained(transformers, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        ids = torch.arange(3, 43)[None] * 7 % 800
        ids[:, 5:21] = whole.config.image_token_id
        pixels = torch.linspace(-2, 2, 3 * 56 * 56).view(1, 3, 56, 56).sin()
        found = whole.eval()(input_ids=ids, pixel_values=pixels).logits[..., :800]
    # The same kernels, but one product over 832 rows instead of 800.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["LLaVA's, bin", "transformers 4's"])
def test_tokenizers_of_all_exports_give_the_same_ids(published, layout, tmp_path):
    export.main([str(published[layout]), str(tmp_path / "transformers")])
    words = ["--export_format", "llava", "--vision_tower", str(CLIP)]
    export.main([str(tmp_path / "transformers"), str(tmp_path / "llava"), *words])
    export.main([str(tmp_path / "llava"), str(tmp_path / "back")])
    tokenizers = [load_tokenizer(tmp_path / name) for name in ("transformers", "llava", "back")]
    for case in json.loads((FIXTURES / "tokenization" / "texts_llama.json").read_text(encoding="utf-8")):
        ids = [tokenizer(case["text"]).input_ids for tokenizer in tokenizers if "<image>" not in case["text"]]
        assert all(other == ids[0] for other in ids), case["text"]


@pytest.mark.parametrize("layout", ["LLaVA's, bin", "transformers 4's"])
def test_llavas_layout_has_the_tokenizer_that_llavas_loader_reads(published, layout, tmp_path):
    export.main([str(published[layout]), str(tmp_path), "--export_format", "llava", "--vision_tower", str(CLIP)])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    original = json.loads((FIXTURES / "llm" / "tokenizer_config.json").read_text())
    for key, value in original.items():
        assert config[key] == value, key
    assert (tmp_path / "tokenizer.model").read_bytes() == (FIXTURES / "llm" / "tokenizer.model").read_bytes()
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_llavas_layout_has_the_tower_if_only_there_it_is_known_to_be(published, layout, tmp_path):
    export.main([str(published[layout]), str(tmp_path), "--export_format", "llava", "--vision_tower", str(CLIP)])
    inside = any("vision_tower" in name for name in load_file(tmp_path / "model.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert inside == config["unfreeze_mm_vision_tower"] == (layout != "LLaVA's, bin")
    assert (config["architectures"], config["vocab_size"]) == (
        ["LlavaLlamaForCausalLM"],
        800 if "LLaVA" in layout else 832,
    )


def test_weights_inside_count_and_not_those_of_the_towers_name(tmp_path):
    folder = like_liuhaotian(tmp_path / "model", "safetensors", with_tower=True)
    shards = {file: load_file(file) for file in folder.glob("model-*.safetensors")}
    for file, weights in shards.items():
        changed = {name: tensor + 0.01 if "class_embedding" in name else tensor for name, tensor in weights.items()}
        save_file(changed, file)
    tower = load_here(folder).vision_tower.model.state_dict()
    named = CLIPVisionModel.from_pretrained(CLIP).state_dict()
    name = next(name for name in named if "class_embedding" in name)
    assert not torch.equal(tower[name], named[name])


@pytest.fixture
def progress_bars():
    """On, whatever a test before has left."""
    were_on = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    if not were_on:
        logging.disable_progress_bar()


def test_only_a_load_that_takes_a_second_shows_a_progress_bar(published, capfd, progress_bars):
    load_here(published["LLaVA's, safetensors with the tower"])
    assert "Loading weights" not in capfd.readouterr().err
    with short_bars_left_out():
        for _ in logging.tqdm(range(2), desc="Loading weights"):
            time.sleep(0.6)
    assert "Loading weights: 100%" in capfd.readouterr().err
    list(logging.tqdm(range(2), desc="Another"))
    assert "Another: 100%" in capfd.readouterr().err


def test_exporting_reads_no_weight_before_it_is_written(published):
    parameters = list(map_llava(open_here(published["transformers 4's"])).parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float16}
    assert not any(parameter.is_meta for parameter in parameters)


def test_the_conversation_template_stays_known(published, tmp_path):
    for name, source, words in (
        ("first", published["LLaVA's, bin"], ["--version", "llava_v1"]),
        ("second", tmp_path / "first", ["--export_format", "llava", "--vision_tower", str(CLIP)]),
        ("third", tmp_path / "second", []),
    ):
        export.main([str(source), str(tmp_path / name), *words])
        assert json.loads((tmp_path / name / "config.json").read_text())["conversation_version"] == "llava_v1"
    assert "curious human" in (tmp_path / "third" / "chat_template.jinja").read_text()


def test_other_language_models_and_tied_embeddings_make_the_round_trip(tmp_path):
    from mini_llava.formats.write import save_llava
    from tests.model.test_formats import build, described, save, tied_language_model

    model = build(language_model=tied_language_model())
    save_llava(tmp_path / "llava", model, described(vision_tower_name=str(CLIP)))
    save(tmp_path / "transformers", model)
    for folder in ("llava", "transformers"):
        source = open_here(tmp_path / folder)
        assert source.language_config.model_type == "qwen2" and source.language_config.tie_word_embeddings
        loaded = load_llava(source, "sdpa", FP32).eval()
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
        assert loaded.language_model.lm_head.weight is loaded.language_model.get_input_embeddings().weight
        map_llava(source)


# --- flags that contradict the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flag_that_says_the_same_is_no_contradiction(published, layout):
    same = {"vision_tower": str(CLIP), "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch"}
    open_here(published[layout], **same, mm_vision_select_layer=-2)
    open_here(published[layout], mm_vision_select_layer=2)  # of four hidden states the same


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("flag", "value"),
    [("mm_projector_type", "linear"), ("mm_vision_select_layer", -1), ("mm_vision_select_feature", "cls_patch")],
)
def test_a_flag_that_contradicts_the_model_is_an_error_that_names_both(published, layout, flag, value):
    with pytest.raises(ValueError, match=rf"--{flag} {value} contradicts {published[layout]}.* says "):
        open_here(published[layout], **{flag: value})


@pytest.mark.parametrize("layout", ["LLaVA's, bin", "transformers 4's"])
def test_another_vision_tower_is_an_error(published, layout, tmp_path):
    other = tmp_path / "another"
    shutil.copytree(CLIP, other)
    edit_json(other / "config.json", intermediate_size=128)
    with pytest.raises(ValueError, match=r"--vision_tower .*another contradicts"):
        open_here(published[layout], vision_tower=str(other))


def test_a_tower_that_has_moved_is_given_by_flag(tmp_path):
    folder = like_liuhaotian(tmp_path / "model")
    edit_json(folder / "config.json", mm_vision_tower="/gone/tower")
    with pytest.raises(ValueError, match=r"names the vision tower /gone/tower, which is not there.*--vision_tower"):
        open_here(folder)
    assert open_here(folder, vision_tower=str(CLIP)).vision_tower == str(CLIP)


def test_a_copy_of_a_tower_of_the_hub_is_that_tower(tmp_path):
    folder = like_liuhaotian(tmp_path / "model")
    edit_json(folder / "config.json", mm_vision_tower="openai/clip")
    assert open_here(folder, vision_tower=str(CLIP)).vision_tower == str(CLIP)


def test_a_language_model_needs_a_tower():
    with pytest.raises(ValueError, match=r"--vision_tower is missing: .*llm is a language model"):
        open_here(FIXTURES / "llm")


# --- what is not whole -----------------------------------------------------------------------------------------------


def change_weights(folder, change):
    """Lets `change` work on the tensors of each file, and the index follow."""
    index = next(folder.glob("*.index.json"))
    weight_map = {}
    for file in sorted(folder.glob("*-of-*")):
        is_bin = file.suffix == ".bin"
        weights = torch.load(file, weights_only=True) if is_bin else load_file(file)
        change(weights)
        torch.save(weights, file) if is_bin else save_file(weights, file)
        weight_map |= dict.fromkeys(weights, file.name)
    write_json(index, {"metadata": {}, "weight_map": weight_map})


PROJECTOR = {"LLaVA's, bin": "model.mm_projector.0.weight", "transformers 4's": "multi_modal_projector.linear_1.weight"}
LAYER = {
    "LLaVA's, bin": "model.layers.1.mlp.up_proj.weight",
    "transformers 4's": "language_model.model.layers.1.mlp.up_proj.weight",
}
BOTH = pytest.mark.parametrize("layout", PROJECTOR)


@BOTH
def test_missing_tensors_are_named(layout, tmp_path):
    folder = LAYOUTS[layout](tmp_path / "model")
    change_weights(folder, lambda weights: weights.pop(LAYER[layout], None))
    with pytest.raises(
        ValueError, match=r"model lacks model\.layers\.1\.mlp\.up_proj\.weight, which the language model"
    ):
        open_here(folder)


@BOTH
def test_surplus_tensors_are_named_with_their_file(layout, tmp_path):
    folder = LAYOUTS[layout](tmp_path / "model")
    surplus = LAYER[layout].replace(".1.", ".2.")

    def add(weights):
        if LAYER[layout] in weights:
            weights[surplus] = torch.zeros(2)

    change_weights(folder, add)
    with pytest.raises(ValueError, match=rf"-of-00002\.\w+ also holds {surplus}, which the language model"):
        open_here(folder)


@BOTH
@pytest.mark.parametrize("part", ["projector", "language model"])
def test_a_wrong_shape_is_named_with_file_and_both_shapes(layout, part, tmp_path):
    folder = LAYOUTS[layout](tmp_path / "model")
    name = (PROJECTOR if part == "projector" else LAYER)[layout]

    def cut(weights):
        if name in weights:
            weights[name] = weights[name][:5].clone()

    change_weights(folder, cut)
    with pytest.raises(ValueError, match=rf"-of-00002\.\w+: {name} is \[5, \d+\], but .* {part} .* needs \[\d+, \d+\]"):
        open_here(folder)


@BOTH
def test_a_shard_that_is_not_there_is_named(layout, tmp_path):
    folder = LAYOUTS[layout](tmp_path / "model")
    shard = sorted(folder.glob("*-of-*"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"index\.json names {shard.name}, which is not beside it"):
        open_here(folder)


@BOTH
def test_a_torn_shard_is_named(layout, tmp_path):
    folder = LAYOUTS[layout](tmp_path / "model")
    shard = sorted(folder.glob("*-of-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-200])
    with pytest.raises(ValueError, match=rf"{shard.name} is not a whole file of weights"):
        open_here(folder)


class Evil:
    def __reduce__(self):
        return pickle.loads, (b"broken",)


def test_a_bin_that_would_run_code_is_refused(tmp_path):
    folder = like_liuhaotian(tmp_path / "model")
    shard = folder / "pytorch_model-00001-of-00002.bin"
    torch.save({"model.norm.weight": Evil()}, shard)
    with pytest.raises(ValueError, match=r"pytorch_model-00001-of-00002\.bin is damaged.*could run code.*not loaded"):
        open_here(folder)


def test_bins_of_before_torch_1_6_are_read(tmp_path, expected):
    folder = like_liuhaotian(tmp_path / "model")
    for shard in folder.glob("*-of-*.bin"):
        weights = torch.load(shard, weights_only=True)
        torch.save(weights, shard, _use_new_zipfile_serialization=False)
    torch.testing.assert_close(logits(load_here(folder)), expected, rtol=0, atol=0)


def test_a_language_model_that_is_not_whole_is_refused(tmp_path):
    folder = tmp_path / "llm"
    shutil.copytree(FIXTURES / "llm", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.extra"] = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"llm lacks model\.norm\.weight"):
        load_here(folder, vision_tower=str(CLIP))


# --- directories that are something else -----------------------------------------------------------------------------


def test_a_stage_1_directory_says_what_it_is(tmp_path):
    folder = like_liuhaotian(tmp_path / "stage1")
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds a projector .*as stage 1 writes it.*--pretrain_mm_mlp_adapter"):
        open_here(folder)


def test_an_adapter_says_what_it_is(tmp_path):
    folder = like_liuhaotian(tmp_path / "lora")
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    write_json(folder / "adapter_config.json", {})
    with pytest.raises(FileNotFoundError, match=r"It holds adapters .* --merge makes"):
        open_here(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mm_patch_merge_type": "spatial_unpad"}, "image_aspect_ratio pad with mm_patch_merge_type spatial_unpad"),
        ({"image_aspect_ratio": "anyres_max_9"}, "known are anyres with flat, spatial, spatial_unpad"),
        (
            {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"},
            "lacks image_newline",
        ),
        ({"model_type": "llava_nonesuch"}, "name no language model"),
        ({"mm_vision_tower": None}, "names no mm_vision_tower"),
    ],
)
def test_llavas_models_that_are_not_known_are_refused_with_the_reason(tmp_path, changes, sentence):
    folder = like_liuhaotian(tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=sentence):
        open_here(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llava_onevision"}, "only LLaVA's .LlavaForConditionalGeneration"),
        ({"model_type": "llava_next", "image_grid_pinpoints": [[56, 112]]}, "lacks image_newline"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu'; known here: gelu"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer \[-2, -5\]"),
        ({"vision_config": {"model_type": "vit"}}, "is vit. Known are clip_vision_model"),
    ],
)
def test_transformers_models_that_are_not_known_are_refused_with_the_reason(tmp_path, changes, sentence):
    folder = like_llava_hf(tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=sentence):
        open_here(folder)


def test_export_says_what_it_needs(published, tmp_path, capsys):
    cases = [
        ([FIXTURES / "llm", tmp_path / "out", "--vision_tower", CLIP], "is a language model"),
        ([published["transformers 4's"], tmp_path / "out", "--export_format", "llava"], "Give it as --vision_tower"),
        ([published["LLaVA's, bin"], published["LLaVA's, bin"], "--overwrite"], "which it is made from"),
    ]
    for words, sentence in cases:
        with pytest.raises(SystemExit) as error:
            export.main([str(word) for word in words])
        assert sentence in str(error.value)
    assert AutoConfig.from_pretrained(published["transformers 4's"]).image_token_id == 800


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_rotary_frequencies_that_were_rounded_while_a_model_was_read_are_exact_again(kind):
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, pad_token_id=0), dtype=torch.float32)
    exact = {name: buffer.clone() for name, buffer in model.named_buffers()}
    frequencies = [name for name in exact if name.endswith("inv_freq")]
    for name in frequencies:
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, exact[name].bfloat16())
    assert frequencies and any(not torch.equal(buffer.float(), exact[name]) for name, buffer in model.named_buffers())
    restore_rotary_frequencies(model)
    assert all(torch.equal(buffer, exact[name]) for name, buffer in model.named_buffers())
