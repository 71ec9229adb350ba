"""Rows of new tokens: added, trained in full or beside adapters, saved, read by PEFT, merged, resumed."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

from mini_llava import build as building
from mini_llava.tools import export
from mini_llava.tools.saved_models import open_saved
from tests.end_to_end import runs
from tests.launching import train_in_turn
from tests.model.test_formats import build, tied_language_model

NEW = ["<loc0>", "<loc1>", "<loc2>"]
IDS = [800, 801, 802]  # behind the 800 of the fixtures' language model
LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0}
STEPS = {"max_steps": 3, "learning_rate": 1e-2, "warmup_ratio": 0, "global_batch_size": 4, "add_tokens": NEW}
STEPS |= {"per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    turns = [{"from": "human", "value": "<image>\nWhere is <loc2>?"}, {"from": "gpt", "value": "At <loc0><loc1>."}]
    file = tmp_path_factory.mktemp("data") / "loc.json"
    file.write_text(json.dumps([{"image": "wide_rgb.png", "conversations": turns}] * 12))
    return file


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """(directory, model in memory) of three steps with adapters and three new tokens."""
    directory, kept, load = tmp_path_factory.mktemp("rows") / "run", [], building.load_llava
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "load_llava", lambda *arguments: kept.append(load(*arguments)) or kept[0])
        runs.train_here(runs.flags_of(2, directory, {**LORA, **STEPS, "data_path": data, "save_steps": 2}))
    return directory, kept[0].eval()


def matrices(model) -> list[torch.Tensor]:
    """Word embeddings and head of a language model."""
    return [m.weight.detach().float() for m in (model.get_input_embeddings(), model.get_output_embeddings())]


@torch.no_grad()
def logits(language_model, ids=(5, 800, 801, 802, 7)) -> torch.Tensor:
    return language_model(input_ids=torch.tensor([ids]), use_cache=False).logits.float()


def test_beside_adapters_the_new_rows_alone_are_trained_and_merged_they_compute_the_same(trained):
    directory, model = trained
    merged = open_saved(str(directory)).load(torch.float32)
    base = AutoModelForCausalLM.from_pretrained(runs.FIXTURES / "llm", dtype=torch.float32)
    for before, after in zip(matrices(base), matrices(merged.language_model), strict=True):
        assert len(after) == 803 and after[:800].equal(before)
        changed = (after[800:] - before.mean(0)).abs().amax(1)
        assert changed.min() > 1e-3 and (after[800] - after[801]).abs().max() > 1e-3
    expected = logits(model.language_model)
    assert (logits(merged.language_model) - expected).abs().max() < 1e-5
    rows = merged.language_model.get_output_embeddings().weight[800:].detach()
    assert rows.equal(model.new_tokens.head.weight.detach())


def test_a_run_without_them_computes_what_the_language_model_does(data, tmp_path):
    """Before the first step the rows are those that they stand in for."""
    values = {**LORA, **STEPS, "data_path": data, "save_strategy": "no", "max_steps": 1, "lora_weight_path": ""}
    losses = []
    for name, more in (("stand in", {}), ("in full", {"lora_enable": False})):
        given = {name: value for name, value in (values | more).items() if more == {} or "lora" not in name}
        runs.train_here(runs.flags_of(2, tmp_path / name, given))
        losses.append(runs.log(tmp_path / name)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_peft_reads_the_rows_onto_the_plain_language_model(trained):
    directory, model = trained
    base = AutoModelForCausalLM.from_pretrained(runs.FIXTURES / "llm", dtype=torch.float32)
    base.resize_token_embeddings(803, mean_resizing=False)
    read = PeftModel.from_pretrained(base, directory).eval()
    expected = logits(model.language_model, (5, 6, *IDS))
    assert (logits(read, (5, 6, *IDS)) - expected).abs().max() < 1e-5


def test_beside_transformers_llava_the_rows_are_in_the_base(trained, tmp_path):
    directory, model = trained
    export.main([str(directory), str(tmp_path / "out"), "--adapters"])
    whole = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    read = PeftModel.from_pretrained(whole, tmp_path / "out" / "adapter").eval()
    expected = logits(model.language_model, (5, 6, *IDS))
    assert (logits(read, (5, 6, *IDS))[..., :803] - expected).abs().max() < 1e-5


def test_the_tokenizer_is_saved_with_the_tokens_and_answers_show_them(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    ids = tokenizer("a <loc1>", add_special_tokens=False).input_ids
    assert 801 in ids and tokenizer.decode(ids, skip_special_tokens=True) == "a <loc1>"


def test_a_resumed_run_ends_with_the_same_bits(trained, data, tmp_path):
    again = tmp_path / "again"
    values = {**LORA, **STEPS, "data_path": data, "resume_from_checkpoint": trained[0] / "checkpoint-2"}
    runs.train_here(runs.flags_of(2, again, values))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (trained[0], again))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)


def test_another_run_starts_from_the_rows_or_says_that_it_does_not_train_them(trained, data, tmp_path):
    values = {**LORA, **STEPS, "data_path": data, "lora_weight_path": trained[0], "learning_rate": 0}
    runs.train_here(runs.flags_of(2, tmp_path / "on", values | {"allow": "learning_rate"}))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (trained[0], tmp_path / "on"))
    assert all(before[name].equal(after[name]) for name in before)
    with pytest.raises(ValueError, match=r"trainable_token_indices \[800, 801, 802\].*\[800\]"):
        runs.train_here(runs.flags_of(2, tmp_path / "off", values | {"add_tokens": NEW[:1]}))


def test_an_unknown_token_is_refused(data, tmp_path):
    values = {**LORA, **STEPS, "data_path": data, "trainable_token_indices": ["<nowhere>"]}
    with pytest.raises(ValueError, match=r"--trainable_token_indices <nowhere>: .* no such token"):
        runs.train_here(runs.flags_of(2, tmp_path, values))


def test_in_full_they_are_trained_with_the_rest_and_a_state_has_them(data, tmp_path):
    runs.train_here(runs.flags_of(2, tmp_path, STEPS | {"data_path": data, "save_steps": 3}))
    whole, state = (open_saved(str(tmp_path / name)) for name in (".", "checkpoint-3"))
    assert whole.tokenizer.convert_tokens_to_ids(NEW) == state.tokenizer.convert_tokens_to_ids(NEW) == IDS
    rows, of_state = (matrices(saved.load().language_model) for saved in (whole, state))
    for one, other in zip(rows, of_state, strict=True):
        assert one[:803].equal(other[:803]) and (one[800] - one[801]).abs().max() > 1e-3


def test_tied_rows_are_one():
    from mini_llava.options.token_rows import TokenRows, peft_names

    model = build(language_model=tied_language_model())
    model.new_tokens = TokenRows(model.language_model, IDS, torch.float32, with_head=True)
    assert len(list(model.new_tokens.parameters())) == 1
    assert list(peft_names(model)) == ["model.embed_tokens.token_adapter.trainable_tokens_delta"]
    with torch.no_grad():
        model.new_tokens.weight.normal_()
        expected = logits(model.language_model)
        model.new_tokens.write_into(model.language_model)
    assert (logits(model.language_model) - expected).abs().max() < 1e-5


@pytest.mark.slow
def test_under_zero3_the_losses_are_those_of_one_process_and_so_are_the_files(trained, data, tmp_path):
    line = runs.flags_of(2, tmp_path / "run", {**LORA, **STEPS, "data_path": data})
    train_in_turn(runs.config_file("zero3", tmp_path), [line], tmp_path)
    losses = [[entry["loss"] for entry in runs.log(folder)] for folder in (trained[0], tmp_path / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in (trained[0], tmp_path / "run"))
    name = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
    assert one.keys() == two.keys() and (one[name] - two[name]).abs().max() < 1e-3
