"""What is checked before step 1: each check fires on what does not belong together, and says so of what does."""

import json
import re
import shutil

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from mini_llava import arguments as flags
from mini_llava.data.lengths import measure
from mini_llava.data.templates import get_template
from mini_llava.formats.read import open_source
from mini_llava.guards import preflight
from mini_llava.guards.preflight import CONTRADICTION, FINE, IMPOSSIBLE, ODD
from mini_llava.inputs import open_samples
from mini_llava.tools.doctor import main as doctor
from mini_llava.tools.export import main as export
from mini_llava.tools.saved_models import open_saved
from mini_llava.training.order import choose_order
from tests.end_to_end.runs import FIXTURES, flags_of, plan_here, train_here
from tests.families import FAMILIES, write_family

SIZES = dict(vocab_size=832, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def language_model(folder, kind="llama", tokenizer=FIXTURES / "llm", **values):
    """A directory with the configuration and the tokenizer of a language model, and no weights: no check reads them."""
    AutoConfig.for_model(kind, **{**SIZES, **values}).save_pretrained(folder)
    for file in tokenizer.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    return folder


def findings(tmp_path, stage=2, **values):
    """Every finding of a run with these flags, by check."""
    arguments = flags.parse_arguments(flags_of(stage, tmp_path / "run", values))
    source = open_source(arguments.model, arguments.explicit, arguments.data)
    arguments = arguments.fixed_by(source)
    samples = open_samples(arguments, source)
    lengths = measure(samples, 1, tmp_path / "cache")
    order = choose_order(arguments, samples.store, lengths, 1)
    found = list(preflight.check_run(arguments, source, samples, lengths, order))
    assert {f.check for f in found} <= {*flags.choices("allow"), "tokens", "positions", "steps"}
    return found


def of(check, found):
    [one] = [finding for finding in found if finding.check == check]
    return one


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Family name to a directory of its tiny model."""
    return {
        name: write_family(FAMILIES[name], tmp_path_factory.mktemp(name) / name) for name in ("qwen_2_5", "gemma_2")
    }


# --- template and tokenizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "llama_3"])
@pytest.mark.parametrize("name", ["qwen_2_5", "gemma_2"])
def test_an_end_mark_that_the_tokenizer_splits_is_refused_with_the_templates_that_fit(name, version, family, tmp_path):
    found = of("template", findings(tmp_path, model_name_or_path=family[name], version=version, packing=False))
    assert found.verdict == CONTRADICTION
    assert re.search(
        rf"--version {version} ends an answer with \S+, which .*{name}\S* splits into \d+ tokens", found.sentence
    )
    fitting = found.sentence.partition("its tokens: ")[2].rstrip(".").split(", ")
    assert "chat_template" in fitting and "v1" not in fitting and "mistral_direct" not in fitting
    for fits in fitting:
        assert (
            of("template", findings(tmp_path, model_name_or_path=family[name], version=fits, packing=False)).verdict
            == FINE
        )


def test_the_template_that_held_out_questions_are_asked_with_is_checked_too(tmp_path):
    eval_data = {"eval_data_path": FIXTURES / "data" / "train_stage2.json", "eval_version": "qwen_2"}
    fine, refused = [f for f in findings(tmp_path, **eval_data) if f.check == "template"]
    assert fine.verdict == FINE and refused.verdict == CONTRADICTION and "--eval_version qwen_2" in refused.sentence


def test_an_opening_mark_that_is_no_token_is_refused_too(tmp_path):
    """Qwen's end mark alone added to a Llama tokenizer: the roles would still be letters."""
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizer_llama_exact")
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = language_model(tmp_path / "llm", tokenizer=tmp_path / "tokenizer")
    found = of("template", findings(tmp_path, model_name_or_path=folder, version="qwen_2"))
    assert found.verdict == CONTRADICTION and "writes <|im_start|>, which" in found.sentence


def test_marks_that_are_text_by_design_are_said_and_not_refused(tmp_path):
    assert of("template", findings(tmp_path, version="llava_v0")).verdict == ODD
    assert of("template", findings(tmp_path, version="v1")).verdict == FINE
    words = Tokenizer(models.WordLevel({"###": 0, "<unk>": 1}, "<unk>"))  # Llama and Llama 3 have the piece ###, too
    [found] = preflight.check_template(get_template("llava_v0"), PreTrainedTokenizerFast(tokenizer_object=words))
    assert found.verdict == ODD and "takes for ordinary text: transformers' generate does not stop" in found.sentence
    assert not [
        f for f in findings(tmp_path, stage=1, packing=False) if f.check == "template"
    ]  # captions end with a line


def test_ids_beyond_the_embeddings_are_refused_and_rows_for_them_can_be_added(with_new_tokens, tmp_path):
    found = of("tokens", findings(tmp_path, model_name_or_path=with_new_tokens))
    assert found.verdict == IMPOSSIBLE and "--resize_token_embeddings True" in found.sentence
    assert "ids up to 802, but the language model's embeddings have 800 rows: 3 rows missing" in found.sentence
    found = of("tokens", findings(tmp_path, model_name_or_path=with_new_tokens, resize_token_embeddings=True))
    assert found.verdict == FINE and "3 of them with new rows" in found.sentence


def test_a_vocabulary_with_gaps_is_judged_by_its_highest_id(tmp_path):
    """It has fewer tokens than the embeddings have rows, and still one without a row."""
    pipeline = json.loads((FIXTURES / "tokenizer_llama_exact" / "tokenizer.json").read_text())
    vocabulary = pipeline["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 840
    folder = language_model(tmp_path / "llm", tokenizer=FIXTURES / "tokenizer_llama_exact")
    (folder / "tokenizer.json").write_text(json.dumps(pipeline))
    found = of("tokens", findings(tmp_path, model_name_or_path=folder))
    assert found.verdict == IMPOSSIBLE
    assert "ids up to 840, but the language model's embeddings have 832 rows" in found.sentence


def test_spare_rows_and_image_marks_are_fine(tmp_path):
    folder = language_model(tmp_path / "llm", vocab_size=832)
    for marks in ({}, {"mm_use_im_start_end": True}):
        assert of("tokens", findings(tmp_path, model_name_or_path=folder, **marks)).verdict == FINE
    assert of("tokens", findings(tmp_path, mm_use_im_start_end=True)).verdict == FINE


# --- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, values, verdict",
    [
        ("llama", {"max_position_embeddings": 64}, ODD),
        ("llama", {"max_position_embeddings": 512}, FINE),
        ("llama", {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, FINE),
        ("qwen2", {"max_position_embeddings": 64, "num_key_value_heads": 4}, ODD),
        # A table of positions has no row beyond its last one.
        ("opt", {"max_position_embeddings": 64, "ffn_dim": 48, "word_embed_proj_dim": 64}, IMPOSSIBLE),
        ("gpt2", {"n_positions": 64}, IMPOSSIBLE),
        ("opt", {"max_position_embeddings": 512, "ffn_dim": 48, "word_embed_proj_dim": 64}, FINE),
    ],
)
def test_samples_longer_than_the_positions_are_said_and_where_they_cannot_be_computed_refused(
    kind, values, verdict, tmp_path
):
    folder = language_model(tmp_path / "llm", kind, **values)
    found = of("positions", findings(tmp_path, model_name_or_path=folder, packing=False))
    assert found.verdict == verdict
    assert ("more than the 64 positions" in found.sentence) == (verdict != FINE)


def test_a_model_without_a_limit_of_positions_is_not_said_to_have_one(tmp_path):
    folder = language_model(tmp_path / "llm", "bloom", n_head=4, n_layer=2)
    assert not [f for f in findings(tmp_path, model_name_or_path=folder, packing=False) if f.check == "positions"]


# --- projector -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """The result of a stage 1, two steps long."""
    output = tmp_path_factory.mktemp("stage1")
    train_here(flags_of(1, output, {"max_steps": 2, "save_strategy": "no"}))
    return output


def test_a_projector_for_these_parts_is_named_and_one_that_starts_at_random_said(stage1, tmp_path):
    for given in (stage1, stage1 / "mm_projector.bin"):
        found = of("projector", findings(tmp_path, pretrain_mm_mlp_adapter=given))
        assert found.verdict == FINE and f"trained for {FIXTURES / 'llm'}" in found.sentence
    assert of("projector", findings(tmp_path)).verdict == ODD
    assert of("projector", findings(tmp_path, stage=1)).verdict == FINE


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("_name_or_path", "lmsys/vicuna-7b-v1.5", "the language model lmsys/vicuna-7b-v1.5, here "),
        ("model_type", "llava_qwen2", "type qwen2, here llama"),
        ("num_hidden_layers", 3, "num_hidden_layers 3, here 2"),
        ("mm_vision_tower", "openai/clip-vit-large-patch14", "the vision tower openai/clip-vit-large-patch14, here "),
        ("mm_vision_select_layer", -1, "mm_vision_select_layer -1, here -2"),
        ("mm_vision_select_feature", "cls_patch", "mm_vision_select_feature cls_patch, here patch"),
        ("mm_projector_type", "linear", "mm_projector_type linear, here mlp2x_gelu"),
        ("mm_hidden_size", 1024, "mm_hidden_size 1024, here 32"),
        ("mm_use_im_start_end", True, "mm_use_im_start_end True, here False"),
    ],
)
def test_a_projector_of_other_parts_is_refused_by_what_its_config_names(key, value, said, stage1, tmp_path):
    folder = shutil.copytree(stage1, tmp_path / "stage1")
    config = json.loads((folder / "config.json").read_text())
    assert key in config and config[key] != value
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    found = of("projector", findings(tmp_path, pretrain_mm_mlp_adapter=folder))
    assert found.verdict == CONTRADICTION and found.sentence.count(", here ") == 1 and said in found.sentence


@pytest.mark.parametrize(
    "key, value",
    [
        ("_name_or_path", "./checkpoints/LLM"),
        ("_name_or_path", "/cache/models--owner--llm/snapshots/0123456789abcdef"),
        ("mm_vision_select_layer", 2),  # of the four hidden states of a tower of three layers
        ("image_aspect_ratio", "anyres"),  # the stages differ in it
        ("conversation_version", "v1"),
    ],
)
def test_the_same_parts_under_other_names_are_the_same(key, value, stage1, tmp_path):
    folder = shutil.copytree(stage1, tmp_path / "stage1")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    assert of("projector", findings(tmp_path, pretrain_mm_mlp_adapter=folder)).verdict == FINE


def test_a_language_model_may_be_the_directory_that_one_stands_in(stage1, tmp_path, monkeypatch):
    monkeypatch.chdir(FIXTURES / "llm")
    assert of("projector", findings(tmp_path, pretrain_mm_mlp_adapter=stage1, model_name_or_path=".")).verdict == FINE


def test_a_projector_about_which_nothing_is_known_is_said_to_be_one(stage1, tmp_path):
    shutil.copy(stage1 / "mm_projector.bin", tmp_path)
    found = of("projector", findings(tmp_path, pretrain_mm_mlp_adapter=tmp_path / "mm_projector.bin"))
    assert found.verdict == ODD and "no config.json next to it" in found.sentence
    for planned in (tmp_path / "later" / "mm_projector.bin", FIXTURES / "data"):  # a folder may be there already
        found = of("projector", findings(tmp_path, pretrain_mm_mlp_adapter=planned))
        assert found.verdict == ODD and found.sentence == f"It starts from {planned}, which does not exist yet."


# --- what is trained, and how long -----------------------------------------------------------------------------------

LORA = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "packing": False}


@pytest.mark.parametrize(
    "kind, values, missed",
    [
        ("llama", {}, None),
        ("mixtral", {"num_local_experts": 4, "num_key_value_heads": 2}, "mlp.experts.gate_up_proj"),
        (
            "qwen3_moe",
            {"num_experts": 4, "moe_intermediate_size": 16, "num_key_value_heads": 2},
            "mlp.experts.down_proj",
        ),
        # Its layers are matrices too, but none of torch's linear layers.
        ("gpt2", {}, "attn.c_attn.weight"),
    ],
)
def test_adapters_reach_all_layers_or_it_is_said_which_not(kind, values, missed, tmp_path):
    folder = language_model(tmp_path / "llm", kind, **values)
    found = next(f for f in findings(tmp_path, model_name_or_path=folder, **LORA) if f.check == "adapters")
    assert found.verdict == (CONTRADICTION if missed else FINE)
    assert missed is None or missed in found.sentence
    assert not [f for f in findings(tmp_path, model_name_or_path=folder, packing=False) if f.check == "adapters"]


def test_a_run_whose_every_rate_is_0_is_refused_and_few_records_are_said(tmp_path):
    records = json.loads((FIXTURES / "data" / "train_stage2.json").read_text())[:20]
    (tmp_path / "twenty.json").write_text(json.dumps(records))
    twenty = {"data_path": tmp_path / "twenty.json", "global_batch_size": 128}
    found = of("learning_rate", findings(tmp_path, **twenty))
    assert found.verdict == CONTRADICTION
    assert "0 in the only step" in found.sentence and "20 records are fewer than a global batch" in found.sentence
    found = of("steps", findings(tmp_path, **twenty, num_train_epochs=3))
    assert found.verdict == ODD and "3 steps; the learning rate rises in the first step." in found.sentence
    assert of("steps", findings(tmp_path, data_path=tmp_path / "twenty.json", global_batch_size=4)).verdict == FINE
    found = of("steps", findings(tmp_path, **twenty, warmup_ratio=0))
    assert found.verdict == ODD and found.sentence.endswith("raise --num_train_epochs.")
    found = of("steps", findings(tmp_path, **twenty, max_steps=2))
    assert found.verdict == ODD and found.sentence.endswith("raise --max_steps.")


def test_rates_that_are_0_as_asked_are_refused_unless_one_is_not(tmp_path):
    assert of("learning_rate", findings(tmp_path, learning_rate=0)).verdict == CONTRADICTION
    assert of("steps", findings(tmp_path, learning_rate=0, mm_projector_lr=1e-3, global_batch_size=4)).verdict == FINE


@pytest.mark.parametrize(
    "stage, values",
    [
        (1, {"mm_projector_lr": 0}),  # of the one part that is trained
        (2, {"learning_rate": 0, "mm_vision_tower_lr": 1e-4}),  # of a tower that is frozen
        (2, {"learning_rate": 0, "mm_projector_lr": 1e-4, "freeze_mm_mlp_adapter": True}),
    ],
)
def test_only_the_rate_of_a_part_that_is_trained_counts(stage, values, tmp_path):
    assert of("learning_rate", findings(tmp_path, stage, **values)).verdict == CONTRADICTION
    trained = {"tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": True}
    assert of("steps", findings(tmp_path, stage, **values | trained, global_batch_size=4)).verdict == FINE


def test_a_run_that_would_skip_all_of_its_records_is_refused(tmp_path):
    records = [{"conversations": [{"from": "human", "value": "What?"}]}] * 3
    (tmp_path / "bad.json").write_text(json.dumps(records))
    found = of("steps", findings(tmp_path, data_path=tmp_path / "bad.json", on_bad_sample="skip"))
    assert found.verdict == IMPOSSIBLE and "All 3 records would be skipped" in found.sentence


# --- what a run does with it -----------------------------------------------------------------------------------------


def test_train_and_plan_refuse_before_weights_are_read_and_name_the_flag_that_allows_it(tmp_path, capsys):
    folder = language_model(tmp_path / "llm")  # has no weights
    values = {"model_name_or_path": folder, "version": "qwen_2", "learning_rate": 0, "max_steps": 2}
    for look in (train_here, plan_here):
        with pytest.raises((ValueError, OSError)) as refused:
            look(flags_of(2, tmp_path / "run", values))
        assert "--allow template" in str(refused.value) and "--allow learning_rate" in str(refused.value)
        with pytest.raises((ValueError, OSError)) as refused:
            look(flags_of(2, tmp_path / "run", values | {"allow": "learning_rate"}))
        assert "--allow template" in str(refused.value) and "--allow learning_rate" not in str(refused.value)
    allowed = {"allow": ["learning_rate", "template"], "gpu_memory_gib": 80}
    plan_here(flags_of(2, tmp_path / "run", values | allowed))
    assert "template      Warning: --version qwen_2 ends an answer with <|im_end|>" in capsys.readouterr().out


def test_the_doctor_says_what_train_would_refuse(tmp_path, capsys):
    folder = language_model(tmp_path / "llm", vocab_size=790, max_position_embeddings=64)
    data = ["--data_path", FIXTURES / "data" / "train_stage2.json", "--image_folder", FIXTURES / "data" / "images"]
    words = [*data, "--tokens_per_image", 16, "--output", tmp_path / "bad.jsonl", "--model_name_or_path"]
    assert doctor([str(word) for word in (*words, folder)]) == 1
    printed = capsys.readouterr().out
    assert "train.py would refuse to start:\nThe tokenizer of" in printed and "10 rows missing" in printed
    assert "positions     Warning: The longest sample has" in printed
    assert doctor([str(word) for word in (*words, FIXTURES / "llm")]) == 0
    assert "would refuse" not in capsys.readouterr().out


def test_the_doctor_takes_from_the_file_of_a_run_what_that_run_allows(with_new_tokens, tmp_path, capsys):
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "<loc_1>"}]
    (tmp_path / "data.json").write_text(json.dumps([{"video": "a.mp4", "conversations": turns}]))
    config = tmp_path / "mine.yaml"
    config.write_text(f"model_name_or_path: {with_new_tokens}\nversion: qwen_2\ndata_path: {tmp_path / 'data.json'}\n")
    words = ["--config", str(config), "--tokens_per_image", "16", "--output", str(tmp_path / "bad.jsonl")]
    assert doctor(words) == 1
    printed = capsys.readouterr().out
    assert "'video' looks like media" in printed and "--allow template" in printed and "3 rows missing" in printed
    config.write_text(config.read_text() + "allow: template\nresize_token_embeddings: true\nleave_unread: video\n")
    assert doctor(words) == 0
    assert "would refuse" not in capsys.readouterr().out


# --- rows for new tokens ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_new_tokens(tmp_path_factory):
    """The fixtures' language model with three more tokens in its tokenizer and no rows for them, and data with them."""
    folder = shutil.copytree(FIXTURES / "llm", tmp_path_factory.mktemp("new_tokens") / "llm")
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizer_llama_exact")
    tokenizer.add_tokens(["<loc_1>", "<loc_2>", "<loc_3>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    turns = [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "<loc_1><loc_3>"}]
    (folder / "loc.json").write_text(json.dumps([{"image": "wide_rgb.png", "conversations": turns}] * 8))
    return folder


RESIZED = {"resize_token_embeddings": True, "max_steps": 2, "warmup_ratio": 0, "learning_rate": 1e-2}
FOUR = {"global_batch_size": 4, "per_device_train_batch_size": 4}


def test_new_rows_start_as_the_mean_and_are_trained_saved_and_read_again(with_new_tokens, tmp_path):
    values = {"model_name_or_path": with_new_tokens, "data_path": with_new_tokens / "loc.json", **RESIZED, **FOUR}
    train_here(flags_of(2, tmp_path / "run", values | {"save_steps": 1}))
    base = open_source(flags.ModelArguments(str(with_new_tokens), str(FIXTURES / "clip"))).load_language_model
    mean = base(None, None).get_input_embeddings().weight[:800].float().mean(0)
    whole, state = (open_saved(str(tmp_path / "run" / name)).load() for name in (".", "checkpoint-2"))
    rows, of_state = (m.language_model.get_output_embeddings().weight[:803].float() for m in (whole, state))
    assert rows.equal(of_state)
    assert (rows[800] - mean).abs().max() > 1e-3 and (rows[800] - rows[801]).abs().max() > 1e-3  # the second is unused


def test_with_adapters_new_rows_stay_the_mean_wherever_they_are_read(with_new_tokens, tmp_path):
    values = {
        "model_name_or_path": with_new_tokens,
        "data_path": with_new_tokens / "loc.json",
        **RESIZED,
        **FOUR,
        **LORA,
    }
    [found] = [f for f in findings(tmp_path, **values) if f.check == "adapters" and f.verdict == ODD]
    assert "3 new tokens stay as they are" in found.sentence
    train_here(flags_of(2, tmp_path / "run", values))
    read = open_saved(str(tmp_path / "run")).load().language_model.get_input_embeddings().weight
    assert read.shape[0] == 803 and read[800].equal(read[802])
    assert (read[800] - read[:800].mean(0)).abs().max() < 1e-6  # fp32 sums


# --- started from a training state -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_state_names_the_command_that_makes_a_model_of_it(tmp_path):
    train_here(flags_of(2, tmp_path / "run", {"max_steps": 2, "save_steps": 2}))
    state = tmp_path / "run" / "checkpoint-2"
    start = {"model_name_or_path": state, "max_steps": 2, "save_strategy": "no"}
    with pytest.raises((ValueError, OSError)) as refused:
        train_here(flags_of(2, tmp_path / "next", start))
    assert f"python -m mini_llava.tools.export {state} OUT" in str(refused.value)
    assert "give the language model as" not in str(refused.value)  # the base, from which all would be lost
    export([str(state), str(tmp_path / "whole")])
    train_here(flags_of(2, tmp_path / "next", start | {"model_name_or_path": tmp_path / "whole"}))
    assert (tmp_path / "next" / "config.json").is_file()


def test_a_directory_of_adapters_names_both_ways_to_go_on(tmp_path):
    train_here(flags_of(2, tmp_path / "run", {"max_steps": 2, "save_strategy": "no", **LORA}))
    with pytest.raises((ValueError, OSError)) as refused:
        train_here(flags_of(2, tmp_path / "next", {"model_name_or_path": tmp_path / "run", "max_steps": 2}))
    assert "--merge" in str(refused.value) and "--lora_weight_path" in str(refused.value)
