"""What is saved is read by transformers as it stands, and computes what the trained parts compute."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    GenerationConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import IMAGE_TOKEN_INDEX, tokenize_prompt
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.formats.towers import load_image_processor, load_vision_tower
from mini_llava.formats.weights import SHARD_BYTES
from mini_llava.formats.write import (
    Description,
    generation_settings,
    save_llava,
    save_projector_only,
    save_transformers,
    why_not_transformers,
)
from mini_llava.model.llava import LlavaModel
from mini_llava.model.projector import build_projector, load_projector
from mini_llava.options.chat_template import chat_template
from mini_llava.options.image_tokens import add_image_tokens
from tests import forked_runs
from tests.slow_llama import SlowLlama, configure, like_llama_2

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
PICTURE = FIXTURES / "data" / "images" / "wide_rgb.png"
PROMPT = "USER: <image>\nWhat is in the picture? ASSISTANT:"
VICUNA_LIKE = {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def build(projector_type="mlp2x_gelu", select_feature="patch", language_model=None) -> LlavaModel:
    tower = load_vision_tower(str(FIXTURES / "clip"), -2, select_feature, torch.float32)
    if language_model is None:
        language_model = AutoModelForCausalLM.from_pretrained(FIXTURES / "llm", dtype=torch.float32)
    torch.manual_seed(0)
    return LlavaModel(tower, build_projector(projector_type, 32, 64), language_model).eval()


def tied_language_model() -> Qwen2ForCausalLM:
    torch.manual_seed(1)
    return Qwen2ForCausalLM(
        Qwen2Config(
            **{"vocab_size": 900, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
            **{"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 2, "initializer_range": 0.2},
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        )
    )


def tokenizer():
    return load_tokenizer(FIXTURES / "tokenizer_llama_exact")


def image_processor():
    return CLIPImageProcessorPil.from_pretrained(FIXTURES / "clip")


def described(**changes) -> Description:
    settings = {"projector_type": "mlp2x_gelu", "vision_tower_name": "clip", "image_aspect_ratio": "pad"}
    settings |= {"model_max_length": 384, "tokenizer": tokenizer(), "image_processor": image_processor()}
    return Description(**settings | {"dtype": torch.float32} | changes)


def save(directory, model, shard_bytes=SHARD_BYTES, **changes):
    save_transformers(directory, model, described(**changes), shard_bytes)


def load_whole(directory) -> LlavaForConditionalGeneration:
    model, loading = LlavaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    return model.eval()


@torch.no_grad()
def logits_from_parts(model: LlavaModel, ids: torch.Tensor, pixel_values, image_token_id: int) -> torch.Tensor:
    """What training computes: features at the placeholders, the language model's own forward on the embeddings."""
    ids = ids.clone()
    places = ids == image_token_id
    ids[places] = 0
    embeddings = model.language_model.get_input_embeddings()(ids)
    if pixel_values is not None:
        embeddings[places] = model.projector(model.vision_tower(pixel_values)).flatten(0, 1)
    return model.language_model(inputs_embeds=embeddings, use_cache=False).logits


@pytest.mark.parametrize("select_feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_computes_the_logits_of_the_trained_parts(tmp_path, select_feature, tied):
    model = build(select_feature=select_feature, language_model=tied_language_model() if tied else None)
    save(tmp_path, model)
    whole, processor = load_whole(tmp_path), AutoProcessor.from_pretrained(tmp_path)

    for text, images in ((PROMPT, Image.open(PICTURE)), ("USER: Name a colour. ASSISTANT:", None)):
        inputs = processor(text=text, images=images, return_tensors="pt")
        assert (inputs["input_ids"] == whole.config.image_token_id).sum() == (
            model.vision_tower.tokens_per_image if images else 0
        )
        with torch.no_grad():
            found = whole(**inputs).logits
        rows = model.language_model.config.vocab_size
        expected = logits_from_parts(
            model, inputs["input_ids"], inputs.get("pixel_values"), whole.config.image_token_id
        )
        torch.testing.assert_close(found[..., :rows], expected, rtol=0, atol=1e-5)


def test_the_auto_classes_load_it_and_generate(tmp_path):
    save(tmp_path, build())
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(text=[PROMPT, "Hello"], images=[Image.open(PICTURE)], return_tensors="pt", padding=True)
    answer = whole.generate(**inputs, max_new_tokens=4)
    assert answer.shape[0] == 2 and answer.shape[1] > inputs["input_ids"].shape[1]
    assert inputs["attention_mask"][1, 0] == 0, "batches to generate from are padded on the left"


def test_new_rows_are_the_mean_of_the_old_ones_and_old_rows_stay(tmp_path):
    model = build()
    save(tmp_path, model)
    whole = load_whole(tmp_path)
    assert whole.config.text_config.vocab_size == 832 and whole.config.image_token_id == 800
    for found, old in (
        (whole.get_input_embeddings().weight, model.language_model.get_input_embeddings().weight),
        (whole.lm_head.weight, model.language_model.lm_head.weight),
    ):
        assert torch.equal(found[:800], old)
        torch.testing.assert_close(found[800:], old.mean(dim=0).expand(32, -1))
    assert len(model.language_model.get_input_embeddings().weight) == 800, "the model in training is not changed"


def test_a_vocabulary_with_room_for_the_image_token_does_not_grow(tmp_path):
    model = build(language_model=tied_language_model())
    save(tmp_path, model)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.text_config.vocab_size == 900 and config.image_token_id == 800


def test_tied_embeddings_are_written_once_and_said_to_be_tied(tmp_path):
    save(tmp_path, build(language_model=tied_language_model()))
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is True and config["text_config"]["tie_word_embeddings"] is True
    whole = load_whole(tmp_path)
    assert whole.lm_head.weight is whole.get_input_embeddings().weight


def test_weights_stream_into_shards_with_an_index(tmp_path):
    model = build()
    save(tmp_path / "one", model)
    save(tmp_path / "many", model, shard_bytes=60_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = {}
    for file in files:
        part = load_file(tmp_path / "many" / file)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 60_000
        parts |= part
    assert parts.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    load_whole(tmp_path / "many")


def test_names_are_those_that_old_and_new_transformers_read(tmp_path):
    save(tmp_path, build())
    names = set(load_file(tmp_path / "model.safetensors"))
    assert {
        "language_model.model.embed_tokens.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.pre_layrnorm.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
    } <= names
    assert len(names) == 21 + 55 + 4


def test_a_second_save_replaces_the_first_and_leaves_nothing_of_it(tmp_path):
    model = build()
    save(tmp_path, model, shard_bytes=60_000, template=get_template("v1"))
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, model)
    assert (tmp_path / "notes.txt").exists()
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert AutoProcessor.from_pretrained(tmp_path).chat_template is None
    load_whole(tmp_path)


def test_the_language_model_s_own_directory_is_not_overwritten(tmp_path):
    base = tmp_path / "llm"
    shutil.copytree(FIXTURES / "llm", base)
    with pytest.raises(ValueError, match=r"type llama.*--output_dir"):
        save(base, build())
    with pytest.raises(ValueError, match=r"type llama.*--output_dir"):
        save_projector_only(base, build(), described())
    AutoModelForCausalLM.from_pretrained(base)


def test_a_save_that_fails_leaves_no_config(tmp_path):
    model = build()
    save(tmp_path, model)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").mkdir()  # a file cannot be moved onto a directory
    with pytest.raises(OSError):
        save(tmp_path, model)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / ".unfinished").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_and_configuration_have_the_same_dtype(tmp_path, dtype):
    save(tmp_path, build(), dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        assert part["dtype"] == part["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert LlavaForConditionalGeneration.from_pretrained(tmp_path).dtype == dtype


def test_no_file_mentions_where_the_parts_came_from(tmp_path):
    save(tmp_path, build())
    for file in tmp_path.glob("*.json"):
        assert str(FIXTURES) not in file.read_text(), file.name
    assert "_name_or_path" not in (tmp_path / "config.json").read_text()


def test_the_base_of_rope_is_where_old_transformers_looks_for_it(tmp_path):
    save(tmp_path, build(language_model=tied_language_model()))
    text_config = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text_config["rope_theta"] == text_config["rope_parameters"]["rope_theta"] == 1000000.0
    assert AutoConfig.from_pretrained(tmp_path).text_config.rope_parameters["rope_theta"] == 1000000.0


ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
ROPE |= dict(original_max_position_embeddings=512)


@pytest.mark.parametrize(
    "model_type, rope, older",
    [
        ("llama", ROPE | {"rope_theta": 500000.0}, {"rope_theta": 500000.0, "rope_scaling": ROPE}),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
            dict(rope_theta=2e6, rope_local_base_freq=2e4, rope_scaling={"rope_type": "linear", "factor": 8.0}),
        ),
    ],
)
def test_scaled_rope_and_that_of_sliding_layers_are_there_too(tmp_path, model_type, rope, older):
    sizes = dict(vocab_size=832, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, rope_parameters=rope)
    if model_type == "gemma3_text":
        sizes |= dict(layer_types=["sliding_attention", "full_attention"])
    config = AutoConfig.for_model(model_type, **sizes)
    save(tmp_path, build(language_model=AutoModelForCausalLM.from_config(config)))
    written = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert {key: written[key] for key in older} == older
    assert AutoConfig.from_pretrained(tmp_path).text_config.rope_parameters == config.rope_parameters


def test_the_cache_that_training_switched_off_is_on_again(tmp_path):
    model = build()
    model.language_model.config.use_cache = False
    save(tmp_path, model)
    assert AutoConfig.from_pretrained(tmp_path).text_config.use_cache
    assert not model.language_model.config.use_cache


def test_a_generation_config_like_vicunas_is_saved_without_its_sampling_values(tmp_path):
    model = build()
    model.language_model.generation_config = GenerationConfig(**VICUNA_LIKE)
    save(tmp_path, model)
    found = GenerationConfig.from_pretrained(tmp_path)
    assert found.temperature in (None, 1.0) and found.top_p in (None, 1.0)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, 0)
    LlavaForConditionalGeneration.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")


def test_sampling_values_stay_where_sampling_is_on():
    found = generation_settings(GenerationConfig(do_sample=True, **VICUNA_LIKE), tokenizer())
    assert (found["do_sample"], found["temperature"], found["top_p"]) == (True, 0.9, 0.6)


def test_generation_stops_at_the_template_s_mark_too():
    marked = tokenizer()
    marked.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    found = generation_settings(GenerationConfig(), marked, stop=("<|im_end|>", "###"))
    assert found["eos_token_id"] == [2, 800]


@pytest.mark.parametrize("mode", ["pad", "square"])
def test_the_saved_processor_gives_the_pixels_that_training_used(tmp_path, mode):
    save(tmp_path, build(), image_aspect_ratio=mode)
    # In its PIL version: with torchvision installed AutoProcessor would choose another one, which resizes differently.
    processor = load_image_processor(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path, backend="pil").image_processor) is type(processor)
    written = json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"]
    assert written == type(processor).__name__.removesuffix("Pil")  # of which transformers 4 takes PIL's
    golden = np.load(FIXTURES / "images_uint8.npz")
    mean, std = (
        np.array(values)[:, None, None] for values in (image_processor().image_mean, image_processor().image_std)
    )
    keys = [key for key in golden.files if key.endswith("|" + mode)]
    assert len(keys) == 8
    for key in keys:
        picture = Image.open(FIXTURES / "data" / "images" / key.split("|")[0]).convert("RGB")
        picture.info.pop("transparency", None)
        found = processor(images=picture, return_tensors="np")["pixel_values"][0]
        np.testing.assert_allclose(found, (golden[key] / 255 - mean) / std, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("template", ["v1", "llava_llama_2", "mistral_instruct", "qwen_2"])
@pytest.mark.parametrize("family", ["tokenizer_llama", "tokenizer_qwen"])
def test_the_saved_processor_gives_the_ids_that_training_used(tmp_path, template, family):
    model, trained_with = build(), load_tokenizer(FIXTURES / family)
    save(tmp_path, model, tokenizer=trained_with)
    processor, picture = AutoProcessor.from_pretrained(tmp_path), Image.open(PICTURE).convert("RGB")
    image_id = AutoConfig.from_pretrained(tmp_path).image_token_id
    assert processor.image_token_id == image_id
    conversations = (
        ["<image>\nWhat colour is it?"],
        ["What colour is it?\n<image>", "Red.", "And  the  other?"],
        ["<image>"],  # the text after the image then begins with a blank
        ["Two: <image><image> Which?", "</s> is no answer", " 你好 "],
    )
    for turns in conversations:
        images = ["x.png"] * turns[0].count("<image>")
        roles = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(turns)]
        ids = tokenize_prompt({"image": images, "conversations": roles}, get_template(template), trained_with, 16)
        text = "".join(piece for piece, _ in get_template(template).render(turns[0::2], turns[1::2], True))
        found = processor(text=text, images=[picture] * len(images))["input_ids"][0]
        assert found == np.where(ids == IMAGE_TOKEN_INDEX, image_id, ids).tolist(), turns


@pytest.mark.parametrize("legacy", [False, True])
def test_messages_with_runs_of_blanks_give_them_too(tmp_path, legacy):
    """The base has no more than a tokenizer.model, the reader the chat template of the processor that was saved."""
    trained_with = load_tokenizer(like_llama_2(tmp_path / "base", legacy=legacy))
    template = add_image_tokens(trained_with, get_template("v1"), True, False)
    save(tmp_path / "run", build(), tokenizer=trained_with, template=template)
    processor, picture = AutoProcessor.from_pretrained(tmp_path / "run"), Image.open(PICTURE).convert("RGB")
    for text, answer in (("a  b", " yes"), ("  if x:\n        return  x", "   "), ("\n \n", "It  is.  "), ("Hi", "Ho")):
        turns = [f"<image>\n{text}", answer, f"{text}   {text}"]
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            {"role": "user", "content": [{"type": "text", "text": turns[2]}]},
        ]
        roles = [{"from": ("human", "gpt")[index % 2], "value": turn} for index, turn in enumerate(turns)]
        ids = tokenize_prompt({"image": ["x.png"], "conversations": roles}, template, trained_with, 16)
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        found = processor(text=prompt, images=[picture])["input_ids"][0]
        assert found == np.where(ids == IMAGE_TOKEN_INDEX, processor.image_token_id, ids).tolist(), turns


def test_only_the_training_template_is_saved(tmp_path):
    template = get_template("v1")
    save(tmp_path / "with", build(), template=template)
    processor = AutoProcessor.from_pretrained(tmp_path / "with")
    assert processor.chat_template == chat_template(template, "<s> ")  # BOS, and the blank of Llama's tokenizer
    prompt = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert prompt.endswith(" USER: Hi ASSISTANT:")

    foreign = tokenizer()
    foreign.chat_template = "Another system prompt"
    save(tmp_path / "without", build(), tokenizer=foreign)
    assert AutoProcessor.from_pretrained(tmp_path / "without").chat_template is None
    assert foreign.chat_template == "Another system prompt" and "<image>" not in foreign.get_vocab()


def test_the_projector_lies_beside_the_whole_model(tmp_path):
    model = build()
    save(tmp_path, model)
    fresh = build_projector("mlp2x_gelu", 32, 64)
    load_projector(fresh, tmp_path)
    assert torch.equal(fresh[2].weight, model.projector[2].weight)


def test_what_transformers_cannot_express_is_named():
    model = build()
    assert why_not_transformers("mlp2x_gelu", model) is None
    for kind in ("linear", "mlp3x_gelu", "identity"):
        assert kind in why_not_transformers(kind, model)
    model.language_model.config.logits_scaling = 8.0
    assert "logits_scaling 8.0" in why_not_transformers("mlp2x_gelu", model)
    del model.language_model.config.logits_scaling
    model.language_model.lm_head = nn.Linear(64, 800, bias=True)
    assert "lm_head.bias" in why_not_transformers("mlp2x_gelu", model)


def test_saving_what_transformers_cannot_express_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mlp3x_gelu.*LLaVA's layout"):
        save(tmp_path, build("mlp3x_gelu"), projector_type="mlp3x_gelu")
    assert not any(tmp_path.iterdir())


def test_llavas_layout_has_llavas_names_and_shapes(tmp_path):
    model = build()
    save_llava(tmp_path, model, described(dtype=torch.float16, include_vision_tower=True))
    with safe_open(FIXTURES / "llava_init" / "model.safetensors", "pt") as golden:
        shapes = {name: golden.get_slice(name).get_shape() for name in golden.keys()}  # noqa: SIM118
    found = load_file(tmp_path / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in found.items()} == shapes
    config = json.loads((tmp_path / "config.json").read_text())
    golden_config = json.loads((FIXTURES / "llava_init" / "config.json").read_text())
    training_only = {
        "mm_projector_lr",
        "tokenizer_model_max_length",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
    for key in golden_config.keys() - training_only:
        assert config[key] == golden_config[key], key
    assert config["torch_dtype"] == "float16" and config["unfreeze_mm_vision_tower"] is True
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 800


@pytest.mark.parametrize("patch", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_llavas_loader_reads_the_ids_trained_with_from_its_layout(tmp_path, legacy, patch):
    """Image tokens around the image, and what the base brings: special, with flags, and not special."""
    base = like_llama_2(tmp_path / "base", legacy=legacy)
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    brought = {
        "814": plain | {"content": "<|im_end|>"},
        "815": plain | {"content": "<sep>", "lstrip": True, "rstrip": True},
        "816": plain | {"content": "<loc>", "normalized": True, "special": False},
    }
    configure(base, added_tokens_decoder=brought)
    trained_with = load_tokenizer(base)
    template = add_image_tokens(trained_with, get_template("v1"), True, patch)
    names = ["<im_patch>"] * patch + ["<im_start>", "<im_end>"]
    saved = tmp_path / "run"
    save_llava(saved, build(), described(tokenizer=trained_with))

    config = json.loads((saved / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["additional_special_tokens"] == ["<|im_end|>", "<sep>", *names]
    assert config["tokenizer_class"] == "LlamaTokenizer" and config["legacy"] is legacy
    tokens = config["added_tokens_decoder"]
    assert [tokens[str(index)]["content"] for index in range(817, 817 + len(names))] == names
    assert tokens["816"]["special"] is False and tokens["815"]["lstrip"] and tokens["815"]["rstrip"]
    assert {file.name for file in saved.glob("*token*")} == {"tokenizer.model", "tokenizer_config.json"}

    slow, again = SlowLlama(saved), load_tokenizer(saved)
    assert slow.prompt("<im_start><image><im_end>\nWhat?", -200)[1:4] == [815 + len(names), -200, 816 + len(names)]
    parts = [
        "",
        " ",
        "  ",
        "\n",
        "What  is it?",
        " <|im_end|>",
        "<|im_end|> ",
        "  <sep>  ",
        " <loc>",
        "<image>",
        *names,
    ]
    for first in parts:
        for second in parts:
            for third in (parts[0], parts[4], parts[2], "<image>", "<im_end>"):
                question = first + second + third
                turns = [{"from": "human", "value": question}]
                record = {"conversations": turns, "image": ["a.png"] * question.count("<image>")}
                text = "".join(piece for piece, _ in template.render([question], [], True))
                text = text.replace("<image>", "<im_start><image><im_end>")
                expected = tokenize_prompt(record, template, trained_with).tolist()
                assert slow.prompt(text, IMAGE_TOKEN_INDEX) == expected, repr(question)
                assert tokenize_prompt(record, template, again).tolist() == expected, repr(question)


@pytest.mark.parametrize("family", ["tokenizer_qwen", "tokenizer_llama"])
def test_llavas_layout_without_a_tokenizer_model_has_names_that_transformers_4_knows(tmp_path, family):
    base = shutil.copytree(FIXTURES / family, tmp_path / "base")
    (base / "tokenizer.model").unlink(missing_ok=True)
    trained_with, saved = load_tokenizer(base), tmp_path / "run"
    save_llava(saved, build(), described(tokenizer=trained_with))
    config = json.loads((saved / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "local_files_only", "extra_special_tokens"} & config.keys()
    if family == "tokenizer_qwen":
        assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    merges = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges)  # tokenizers before 0.20
    again = load_tokenizer(saved)
    for text in ("a  b", "  if x:\n        return", "<|im_start|>user\n  Hi<|im_end|>\n", " 你好  ", "ends</s>  next"):
        assert again(text).input_ids == trained_with(text).input_ids


@pytest.mark.parametrize("kind", ["linear", "mlp3x_gelu"])
def test_llavas_layout_takes_every_projector_and_leaves_a_frozen_tower_out(tmp_path, kind):
    model = build(kind)
    save_llava(tmp_path, model, described(projector_type=kind))
    found = load_file(tmp_path / "model.safetensors")
    assert not any("vision_tower" in name for name in found)
    for name, tensor in model.projector.state_dict().items():
        assert torch.equal(found[f"model.mm_projector.{name}"], tensor)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mm_projector_type"] == kind and config["unfreeze_mm_vision_tower"] is False


def test_stage_one_leaves_a_projector_and_a_config_with_llavas_keys(tmp_path):
    model = build()
    save_projector_only(tmp_path, model, described())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "mm_projector.bin"]
    config = json.loads((tmp_path / "config.json").read_text())
    expected = {
        "mm_vision_tower": "clip",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 384,
        "tune_mm_mlp_adapter": True,
        "model_type": "llava_llama",
        "hidden_size": 64,
        "vocab_size": 800,
    }
    assert {key: config[key] for key in expected} == expected


@pytest.mark.slow
def test_a_partitioned_model_is_saved_as_a_whole_one_is(tmp_path):
    folder, program = tmp_path / "partitioned", "tests/model/zero3_save.py"
    run = forked_runs.start([str(folder)], tmp_path / "printed.txt", "cpu", 2, program=program)
    assert run.wait() == 0, run.text[-4000:]

    for name, language_model in (("llama", None), ("qwen", tied_language_model())):
        model, whole, partitioned = build(language_model=language_model), tmp_path / "whole", tmp_path / "partitioned"
        save(whole / name / "transformers", model, shard_bytes=60_000)
        save_llava(whole / name / "llava", model, described(include_vision_tower=True))
        save_projector_only(whole / name / "projector", model, described())
        files = sorted(file.relative_to(whole) for file in (whole / name).rglob("*") if file.is_file())
        assert files == sorted(
            file.relative_to(partitioned) for file in (partitioned / name).rglob("*") if file.is_file()
        )
        for file in files:
            assert (whole / file).read_bytes() == (partitioned / file).read_bytes(), file
