"""LLaVA's legacy image tokens: in the text, in the vocabulary, trained in stage 1 alone and read by stage 2."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import IMAGE_TOKEN_INDEX, tokenize_prompt
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.options.image_tokens import add_image_tokens, add_token_rows, read_rows
from mini_llava.options.token_rows import TokenRows
from mini_llava.tools import export
from mini_llava.tools.saved_models import open_saved
from tests.end_to_end import runs
from tests.launching import train_in_turn
from tests.model.test_formats import PICTURE, build, tied_language_model, tokenizer

START, END = 801, 802  # behind the 800 tokens of the language model and <im_patch>
MARKS = {"mm_use_im_start_end": True, "mm_use_im_patch_token": True}
STEPS = {"max_steps": 2, "warmup_ratio": 0, "learning_rate": 1e-2, "weight_decay": 0.1, "global_batch_size": 8}


@pytest.mark.parametrize("version", ["plain", "v1", "v1_mmtag"])
def test_start_and_end_stand_around_the_image(version):
    with_marks = tokenizer()
    template = add_image_tokens(with_marks, get_template(version), True, True)
    turns = [{"from": "human", "value": "What is this?\n<image>"}, {"from": "gpt", "value": "A cat."}]
    ids = tokenize_prompt({"conversations": turns, "image": "cat.png"}, template, with_marks, 3).tolist()
    first = ids.index(IMAGE_TOKEN_INDEX)
    assert ids[first - 1 : first + 4] == [START, *[IMAGE_TOKEN_INDEX] * 3, END]
    assert ids.count(START) == ids.count(END) == 1 and 800 not in ids


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_the_old_ones_in_embeddings_and_head(tied):
    model = build(language_model=tied_language_model() if tied else None)  # the tied one has 900 rows, room enough
    old = [m.weight.clone() for m in (model.language_model.get_input_embeddings(), model.language_model.lm_head)]
    with_marks = tokenizer()
    add_image_tokens(with_marks, get_template("v1"), True, True)
    add_token_rows(model, with_marks, 3, (True, True))
    new = [model.language_model.get_input_embeddings().weight, model.language_model.lm_head.weight]
    assert (new[0] is new[1]) == tied
    for before, after in zip(old, new, strict=True):
        assert len(after) == (900 if tied else 803) == model.language_model.config.vocab_size
        assert torch.equal(after[:800], before[:800]) and torch.equal(after[803:], before[803:])
        torch.testing.assert_close(after[800:803], before[:800].mean(0).expand(3, -1))


def test_trained_rows_are_multiplied_as_gemma_multiplies_what_it_looks_up():
    config = AutoConfig.for_model("gemma", vocab_size=900, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=16)  # fmt: skip
    model, with_marks = build(language_model=AutoModelForCausalLM.from_config(config)), tokenizer()
    add_image_tokens(with_marks, get_template("v1"), True, True)
    add_token_rows(model, with_marks, 3, (True, True))
    rows = TokenRows(model.language_model, [START, END], torch.float32, with_head=False)
    ids, nowhere = torch.tensor([[5, START, END]]), torch.zeros(0, dtype=torch.int64)
    beside = model.embed(ids, torch.zeros(1, 3, 56, 56), nowhere)
    rows.write_into(model.language_model)
    assert torch.equal(beside, model.embed(ids, torch.zeros(1, 3, 56, 56), nowhere))


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage 1")
    runs.train_here(runs.flags_of(1, folder, STEPS | MARKS))
    return folder


def mean_row() -> torch.Tensor:
    return build().language_model.get_input_embeddings().weight.detach().mean(0).expand(2, -1)


def test_stage_1_trains_the_two_rows_and_saves_them_with_the_projector(stage1):
    weights = torch.load(stage1 / "mm_projector.bin", weights_only=True)
    rows = weights["model.embed_tokens.weight"]
    assert rows.shape == (2, 64)
    assert (rows - mean_row()).norm(dim=-1).min() > 1e-2 and not torch.equal(rows[0], rows[1])
    assert {name for name in weights if "mm_projector" not in name} == {"model.embed_tokens.weight"}
    config = json.loads((stage1 / "config.json").read_text())
    assert config["mm_use_im_start_end"] is True and config["mm_use_im_patch_token"] is True
    assert config["vocab_size"] == 803


def test_stage_2_reads_them_and_exports_a_model_with_the_same_prompt_ids(stage1, tmp_path):
    values = (
        STEPS
        | MARKS
        | {"learning_rate": 0, "allow": "learning_rate", "max_steps": 1, "pretrain_mm_mlp_adapter": stage1}
    )
    runs.train_here(runs.flags_of(2, tmp_path, values))
    whole, loading = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert torch.equal(whole.get_input_embeddings().weight[START : END + 1], read_rows(stage1))

    with_marks = load_tokenizer(runs.FIXTURES / "llm")
    template = add_image_tokens(with_marks, get_template("v1"), True, True)
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}]
    expected = tokenize_prompt({"conversations": turns, "image": "a.png"}, template, with_marks, 16)
    processor = AutoProcessor.from_pretrained(tmp_path)
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    found = processor(text=prompt, images=Image.open(PICTURE), return_tensors="pt").input_ids[0]
    found[found == whole.config.image_token_id] = IMAGE_TOKEN_INDEX
    assert found.tolist() == expected.tolist()

    # Either layout says that it has them: the tools and a further run put them into the text again.
    tower = ["--vision_tower", str(runs.FIXTURES / "clip")]
    export.main([str(tmp_path), str(tmp_path / "llava"), "--export_format", "llava", *tower])
    for directory in (tmp_path, tmp_path / "llava", stage1):
        saved = open_saved(str(directory), version="v1")
        again = tokenize_prompt({"conversations": turns, "image": "a.png"}, saved.template, saved.tokenizer, 16)
        assert again.tolist() == expected.tolist()
        model = saved.load(torch.float32)
        assert torch.equal(model.language_model.get_input_embeddings().weight[START : END + 1], read_rows(stage1))
        assert model.use_im_start_end and model.first_image_token == START


def test_llavas_file_with_the_whole_matrix_gives_its_last_two_rows(stage1, tmp_path):
    weights = torch.load(stage1 / "mm_projector.bin", weights_only=True)
    rows = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([torch.zeros(801, 64), rows])
    torch.save(weights, tmp_path / "mm_projector.bin")
    assert torch.equal(read_rows(tmp_path), rows)


def test_a_projector_without_the_rows_is_refused_where_they_are_needed(stage1, tmp_path):
    weights = torch.load(stage1 / "mm_projector.bin", weights_only=True)
    del weights["model.embed_tokens.weight"]
    torch.save(weights, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="no rows for <im_start> and <im_end>"):
        runs.train_here(runs.flags_of(2, tmp_path / "run", STEPS | MARKS | {"pretrain_mm_mlp_adapter": tmp_path}))


def test_a_lora_directory_carries_them(stage1, tmp_path):
    values = STEPS | MARKS | {"lora_enable": True, "lora_r": 4, "pretrain_mm_mlp_adapter": stage1}
    runs.train_here(runs.flags_of(2, tmp_path, values))
    merged = open_saved(str(tmp_path)).load(torch.float32)
    assert torch.equal(merged.language_model.get_input_embeddings().weight[START : END + 1], read_rows(stage1))
    assert merged.use_im_start_end and merged.use_im_patch_token


@pytest.mark.slow
def test_under_zero3_on_two_processes_the_same_rows_come_out(stage1, tmp_path):
    stage2 = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0, "pretrain_mm_mlp_adapter": tmp_path / "stage1"}
    lines = [
        runs.flags_of(1, tmp_path / "stage1", STEPS | MARKS),
        runs.flags_of(2, tmp_path / "stage2", STEPS | MARKS | stage2),
        runs.flags_of(2, tmp_path / "full", STEPS | MARKS | {"pretrain_mm_mlp_adapter": tmp_path / "stage1"}),
    ]
    train_in_turn(runs.config_file("zero3", tmp_path), lines, tmp_path)
    rows = read_rows(tmp_path / "stage1")
    # Two steps of AdamW; the order of fp32 sums differs.
    torch.testing.assert_close(rows, read_rows(stage1), rtol=0, atol=1e-5)
    others = torch.load(tmp_path / "stage2" / "non_lora_trainables.bin", weights_only=True)
    assert torch.equal(others["base_model.model.model.embed_tokens.weight"], rows)
    head = load_file(tmp_path / "full" / "model.safetensors")["language_model.lm_head.weight"]
    assert len(head) == 832 and head[START].norm() > 0 and head.isfinite().all()
