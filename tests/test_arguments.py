"""Flags, presets and files; whatever a person can get wrong ends with a sentence, as it is seen at the terminal."""

import dataclasses
import json
import os
import re

import pytest
import transformers
import yaml

from mini_llava import arguments as flags
from mini_llava.command_line import field_texts
from mini_llava.elsewhere import ELSEWHERE
from mini_llava.guards.early import check_tracker
from mini_llava.tools import chat, convert, doctor, export, inspect, plan, tour
from mini_llava.training.backend import choose_precision
from mini_llava.training.order import choose_batch
from mini_llava.training.schedule import warmup_steps
from tests.forked_runs import ROOT, start

FIXTURES = ROOT / "tests" / "parity" / "fixtures"
MODEL = ["--model_name_or_path", "lmsys/vicuna-7b-v1.5", "--vision_tower", "openai/clip-vit-large-patch14-336"]
DATA = ["--data_path", "captions.json", "--image_folder", "images"]
HELD_OUT = ["--eval_data_path", "held_out.json"]

# The flags of LLaVA's scripts/v1_5/pretrain.sh and finetune.sh. `--deepspeed` stands before the training script's own
# flags there and is what `accelerate launch --config_file` replaces.
PRETRAIN_SH = """
    --model_name_or_path lmsys/vicuna-13b-v1.5 --version plain
    --data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
    --image_folder ./playground/data/LLaVA-Pretrain/images
    --vision_tower openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu --tune_mm_mlp_adapter True
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True
    --output_dir ./checkpoints/llava-v1.5-13b-pretrain --num_train_epochs 1 --per_device_train_batch_size 32
    --per_device_eval_batch_size 4 --gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps
    --save_steps 24000 --save_total_limit 1 --learning_rate 1e-3 --weight_decay 0. --warmup_ratio 0.03
    --lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True
    --dataloader_num_workers 4 --lazy_preprocess True --report_to wandb
"""
FINETUNE_SH = """
    --model_name_or_path lmsys/vicuna-13b-v1.5 --version v1
    --data_path ./playground/data/llava_v1_5_mix665k.json --image_folder ./playground/data
    --vision_tower openai/clip-vit-large-patch14-336
    --pretrain_mm_mlp_adapter ./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin --mm_projector_type mlp2x_gelu
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad
    --group_by_modality_length True --bf16 True --output_dir ./checkpoints/llava-v1.5-13b --num_train_epochs 1
    --per_device_train_batch_size 16 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
    --evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1 --learning_rate 2e-5
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 True
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
    --report_to wandb
"""


def parse(*command_line: str, stage: int = 1) -> flags.Arguments:
    return flags.parse_arguments(["--stage", str(stage), *MODEL, *DATA, *command_line])


def parse_error(capsys, *command_line: str) -> str:
    """What the parser prints before it exits with 2: one line."""
    with pytest.raises(SystemExit) as end:
        flags.parse_arguments(list(command_line))
    [sentence] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and sentence.startswith("train.py: error: ")
    return sentence


# --- command lines, presets, files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, script", [(1, PRETRAIN_SH), (2, FINETUNE_SH)], ids=["pretrain.sh", "finetune.sh"])
def test_llavas_published_command_lines_are_accepted_as_written(stage, script):
    words = script.split()
    arguments = flags.parse_arguments(["--stage", str(stage), *words])
    resolved, given = arguments.as_dict(), dict(zip(words[::2], words[1::2], strict=True))
    for flag, text in given.items():
        value = resolved[flag.removeprefix("--")]
        assert (
            value == type(value)(text)
            if isinstance(value, int | float) and not isinstance(value, bool)
            else (value in ([text], text, text == "True"))
        )
    # On eight devices they give the published global batches.
    assert choose_batch(arguments, 8) == ({1: 256, 2: 128}[stage], 1, None)


def test_the_presets_are_llava_1_5s_published_recipe():
    both = dict(
        num_train_epochs=1.0,
        weight_decay=0.0,
        warmup_ratio=0.03,
        lr_scheduler_type="cosine",
        bf16=True,
        model_max_length=2048,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        freeze_backbone=False,
        unfreeze_mm_vision_tower=False,
    )
    first = dict(
        version="plain",
        tune_mm_mlp_adapter=True,
        image_aspect_ratio="square",
        group_by_modality_length=False,
        learning_rate=1e-3,
        per_device_train_batch_size=32,
        global_batch_size=256,
        output_dir="outputs/stage1",
    )
    second = dict(
        version="v1",
        tune_mm_mlp_adapter=False,
        image_aspect_ratio="pad",
        group_by_modality_length=True,
        learning_rate=2e-5,
        per_device_train_batch_size=16,
        global_batch_size=128,
        output_dir="outputs/stage2",
    )
    for stage, preset in ((1, both | first), (2, both | second)):
        resolved = parse(stage=stage).as_dict()
        assert {name: resolved[name] for name in preset} == preset


def test_the_command_line_wins_over_the_file_over_the_preset_over_the_default(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("learning_rate: 3e-4\nweight_decay: 0.1\nseed: 1\n")
    resolved = parse("--config", str(config), "--weight_decay", "0.2").as_dict()
    assert resolved["weight_decay"] == 0.2  # command line
    assert resolved["learning_rate"] == 3e-4 and resolved["seed"] == 1  # file
    assert resolved["warmup_ratio"] == 0.03  # preset
    assert resolved["adam_beta2"] == 0.999  # default


def test_a_file_may_hold_everything_and_the_saved_arguments_are_such_a_file(tmp_path):
    first = parse("--max_steps", "7", "--mm_projector_lr", "2e-5")
    values = first.as_dict()
    config = tmp_path / "all.yaml"
    config.write_text(yaml.safe_dump(values))
    assert flags.parse_arguments(["--stage", "1", "--config", str(config)]).as_dict() == values


@pytest.mark.parametrize(
    "text, sentence",
    [
        (None, "No such file"),
        ("a: [", "is not valid YAML"),
        ("- seed", "must hold `flag: value` lines"),
        ("learning_rat: 1", "unknown flag --learning_rat, did you mean --learning_rate?"),
        ("seed: many", "seed: 'many' is not a whole number"),
        ("seed: 1.5", "seed: 1.5 is not a whole number"),
        ("bf16: 1", "bf16: 1 is not True or False"),
        ("learning_rate: fast", "learning_rate: 'fast' is not a number"),
        ("stage: 2", "is written for stage 2, which contradicts --stage 1"),
        ("run_name: x", "--run_name is not a flag here: a run is named by its --output_dir"),
        ("save_strategy: best", "known values are steps, epoch, no"),
    ],
)
def test_a_faulty_file_is_named_with_what_is_wrong(text, sentence, tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    if text is not None:
        config.write_text(text)
    message = parse_error(capsys, "--stage", "1", *MODEL, *DATA, "--config", str(config))
    assert sentence in message
    assert str(config) in message or "known values" in message


def test_a_bare_no_in_yaml_is_the_text_no(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("save_strategy: no\nevaluation_strategy: no\n")
    assert parse("--config", str(config)).training.save_strategy == "no"


@pytest.mark.parametrize(
    "given, value",
    [("True", True), ("true", True), ("1", True), (None, True), ("False", False), ("false", False), ("0", False)],
)
def test_booleans_are_read_as_llavas_scripts_write_them(given, value):
    assert parse("--gradient_checkpointing", *([given] if given else [])).training.gradient_checkpointing is value


def test_a_boolean_that_is_neither_is_an_error(capsys):
    assert "'perhaps' is not True or False" in parse_error(capsys, "--stage", "1", *MODEL, *DATA, "--bf16", "perhaps")


def test_lists_take_several_paths():
    arguments = parse("--data_path", "a.json", "b.json", "--image_folder", "a", "b")
    assert arguments.data.data_path == ["a.json", "b.json"] and arguments.data.image_folder == ["a", "b"]


def test_data_weights_are_numbers_one_for_each_file_on_the_command_line_and_in_a_file(tmp_path):
    files = ["--data_path", "a.json", "b.json"]
    assert parse(*files, "--data_weights", "0.5", "2").data.data_weights == [0.5, 2.0]
    config = tmp_path / "mine.yaml"
    config.write_text("data_weights: [0.5, 2]\n")
    assert parse(*files, "--config", str(config)).data.data_weights == [0.5, 2.0]
    assert parse(*files, "--data_weights", "1", "1").data.data_weights is None  # what is done without


def help_text(capsys, flag: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        flags.parse_arguments([flag])
    return capsys.readouterr().out


def test_help_shows_what_most_runs_need_in_a_line_or_two_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    shown = help_text(capsys, "--help")
    common = [name for names in flags.COMMON_FLAGS.values() for name in names]
    assert set(re.findall(r"^  --(\w+)", shown, re.MULTILINE)) == {*common, "help_all", "stage", "config"}
    assert 20 <= len(common) <= 30 and len(shown.splitlines()) < 70
    assert "[stage 1: 0.001, stage 2: 2e-05]" in shown and "All other flags: python train.py --help_all" in shown
    texts = {name: text for kind in flags.PARTS for name, text in field_texts(kind).items()}
    for name in common:
        sentence = texts[name].split(". ")[0]
        assert len(sentence) < 90 and sentence in " ".join(shown.split()), name


def test_every_field_has_a_text_and_help_all_shows_all_of_them(capsys):
    shown = help_text(capsys, "--help_all")
    for kind in (flags.ModelArguments, flags.DataArguments, flags.TrainingArguments):
        texts = field_texts(kind)
        for field in dataclasses.fields(kind):
            assert len(texts[field.name]) > 10, field.name
            assert f"--{field.name} " in shown
    assert "[stage 1: 0.001, stage 2: 2e-05]" in " ".join(shown.split())


@pytest.mark.parametrize(
    "tool, words, sentence",
    [
        (plan, ["--gpu_nmae", "H100"], "plan: error: unknown flag --gpu_nmae, did you mean --gpu_name?"),
        (inspect, ["--smaples", "3"], "inspect: error: unknown flag --smaples, did you mean --samples?"),
        (tour, ["--recrod", "3"], "tour: error: unknown flag --recrod, did you mean --record?"),
        (tour, ["--qqq"], "tour: error: unknown flag --qqq; see --help_all."),
        (doctor, ["--learning_rate", "1"], "doctor: error: unknown flag --learning_rate; see --help."),
        (chat, ["somewhere", "--qqq"], "chat: error: unknown flag --qqq; see --help."),
        (chat, ["--drectory", "somewhere"], "chat: error: unknown flag --drectory; see --help."),
        (convert, ["a", "--ouput", "b"], "convert: error: unknown flag --ouput, did you mean --output?"),
        (convert, ["--ouput=b"], "convert: error: unknown flag --ouput, did you mean --output?"),
        (convert, ["--output", "b"], "convert: error: the following arguments are required: SOURCE"),
        (export, ["a", "--dtpye", "b"], "export: error: unknown flag --dtpye, did you mean --dtype?"),
    ],
)
def test_a_tool_names_its_own_flags_and_a_help_that_it_has(tool, words, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        tool.parse_arguments(words)
    assert capsys.readouterr().err == f"{sentence}\n"


@pytest.mark.parametrize("rank", ["", "0", "none"])
def test_a_rank_that_is_no_number_hides_no_sentence(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(SystemExit, match="2"):
        flags.parse_arguments(["--qqq"])
    assert capsys.readouterr().err == "train.py: error: unknown flag --qqq; see --help_all.\n"


# --- faults that the parser finds ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--learning_rte", "1"], "unknown flag --learning_rte, did you mean --learning_rate?"),
        (["--learning_rte=1"], "unknown flag --learning_rte, did you mean --learning_rate?"),
        (["--qqq"], "unknown flag --qqq; see --help_all."),
        (["--learning_rate", "fast"], "argument --learning_rate: invalid float value: 'fast'"),
        (["--image_aspect_ratio", "any"], "--image_aspect_ratio any: known values are square, pad, anyres."),
        (["--lr_scheduler_type", "cosin"], "known values are cosine, linear, constant, constant_with_warmup."),
        (["--evaluation_strategy", "epoch"], "--evaluation_strategy epoch: known values are no, steps."),
        (["--evaluation_strategy", "steps"], "--evaluation_strategy steps needs --eval_steps."),
        ([*HELD_OUT, "--eval_steps", "5", "--evaluation_strategy", "no"], "--evaluation_strategy no does not: leave"),
        ([*HELD_OUT, "--eval_steps", "-1"], "--eval_steps must not be negative, found -1."),
        (["--eval_steps", "5"], "--eval_steps needs --eval_data_path."),
        (["--eval_samples_shown", "5"], "--eval_samples_shown needs --eval_data_path."),
        (["--save_steps", "0"], "--save_steps must be positive, not 0."),
        (["--save_steps", "1.5"], "--save_steps 1.5: give whole steps, or below 1 a share of all steps."),
        (["--save_steps", "inf"], "--save_steps inf: give whole steps,"),
        (["--gradient_checkpointing_share", "0"], "--gradient_checkpointing_share 0.0: give a share of the layers"),
        (["--gradient_checkpointing", "False", "--gradient_checkpointing_share", "0.5"], "has no effect with"),
        (["--bf16", "True", "--fp16", "True"], "--bf16 and --fp16 cannot both be True."),
        (["--loss_normalization", "micro_batch", "--packing", "True"], "use --packing False."),
        (["--freeze_mm_mlp_adapter", "True"], "leave nothing to train."),
        (["--unfreeze_mm_vision_tower", "True"], "--unfreeze_mm_vision_tower contradicts it."),
        (["--data_weights", "1", "2"], "--data_weights lists 2 numbers and --data_path 1 file;"),
        (["--data_weights", "-1"], "--data_weights -1: weights must be above 0;"),
        (["--data_weights", "nan"], "--data_weights nan: weights must be above 0;"),
        (["--data_weights", "2", "--sample_order", "a.json"], "--data_weights contradicts it."),
        (["--leave_unread", "video", "image"], "--leave_unread image: this is always read; name keys and marks that"),
        (["--leave_unread", "<image>"], "--leave_unread <image>: this is always read"),
        (["--eval_max_samples", "5"], "--eval_max_samples needs --eval_data_path."),
        (["--model_name_or_path", "/no/such/model"], "--model_name_or_path /no/such/model is not a directory"),
        (["--model_name_or_path", str(ROOT / "README.md")], "README.md is not a directory"),
        (["--vision_tower", str(ROOT / "tests")], "is a directory without config.json"),
        (
            ["--deepspeed", "zero3.json"],
            "python -m mini_llava.launch --config_file accelerate_configs/zero3.yaml train.py",
        ),
        (["--run_name=x"], "--run_name is not a flag here: a run is named by its --output_dir"),
        (["--save_only_model", "True"], "--save_strategy no"),
        (["--cache_dir", "d"], "HF_HOME"),
        (["--fsdp", "full_shard"], "accelerate_configs/zero3.yaml"),
        (["--ddp_find_unused_parameters", "False"], "DDP is set up by the program"),
        (["--seed", "1", "stray"], "'stray' belongs to no flag."),
    ],
)
def test_a_faulty_flag_is_one_sentence(words, sentence, capsys):
    assert sentence in parse_error(capsys, "--stage", "1", *MODEL, *DATA, *words)


LORA = ["--lora_enable", "True"]


@pytest.mark.parametrize(
    "stage, words, sentence",
    [
        ("1", LORA, "--tune_mm_mlp_adapter (stage 1's preset) trains the projector only; --lora_enable contradicts it"),
        ("2", [*LORA, "--freeze_backbone", "True"], "--freeze_backbone keeps the language model as it is"),
        ("2", ["--bits", "4"], "--bits 4 freezes the quantised weights: it needs --lora_enable True."),
        ("2", [*LORA, "--bits", "3"], "--bits 3: known values are 4, 8, 16."),
        ("2", ["--lora_r", "8"], "--lora_r 8 does nothing without --lora_enable True."),
        ("2", [*LORA, "--bits", "8", "--quant_type", "fp4"], "--quant_type fp4 does nothing without --bits 4."),
        ("2", [*LORA, "--bits", "4", "--fp8", "True"], "--fp8 True does nothing without --bits 16."),
        ("2", [*LORA, "--lora_dropout", "1"], "--lora_dropout must be at least 0 and below 1, not 1.0."),
        ("2", [*LORA, "--lora_bias", "some"], "--lora_bias some: known values are none, all, lora_only."),
        (
            "2",
            [*LORA, "--lora_weight_path", "there", "--pretrain_mm_mlp_adapter", "here"],
            "--lora_weight_path brings a projector of its own: leave --pretrain_mm_mlp_adapter out.",
        ),
    ],
)
def test_what_contradicts_lora_is_one_sentence(stage, words, sentence, capsys):
    assert sentence in parse_error(capsys, "--stage", stage, *MODEL, *DATA, *words)


def test_stage_2_with_lora_has_the_values_of_llavas_script_and_flags_win():
    def rates(*words):
        training = flags.parse_arguments(["--stage", "2", *MODEL, *DATA, *words]).training
        return training.lora_r, training.lora_alpha, training.learning_rate, training.mm_projector_lr

    assert rates(*LORA) == (128, 256, 2e-4, 2e-5)
    assert rates(*LORA, "--lora_r", "16", "--learning_rate", "1e-4") == (16, 256, 1e-4, 2e-5)
    assert rates() == (64, 16, 2e-5, None)


def test_a_flag_that_is_answered_with_how_it_is_done_here_is_none_of_ours():
    known = {action.dest for action in flags._build_parser()._actions}
    assert not known & ELSEWHERE.keys()
    named = set(re.findall(r"--(\w+)", " ".join(ELSEWHERE.values()))) - {"config_file", "model_base"}
    assert named <= known, "an answer names a flag that is not there"


def test_every_flag_of_transformers_is_one_here_or_is_answered():
    known = {action.option_strings[-1].removeprefix("--") for action in flags._build_parser()._actions}
    theirs = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert not theirs - known - ELSEWHERE.keys()


# What LLaVA's scripts/finetune.sh ("the original LLaVA, NOT FOR LLaVA V1.5") leaves out of scripts/v1_5/finetune.sh.
LEFT_OUT = ("--mm_projector_type mlp2x_gelu", "--image_aspect_ratio pad", "--group_by_modality_length True")


def test_llavas_older_scripts_do_not_silently_get_the_presets_of_llava_1_5(capsys):
    pretrain = PRETRAIN_SH.replace(LEFT_OUT[0], "").split()
    assert "mean --mm_projector_type linear; here stage 1 means" in parse_error(capsys, "--stage", "1", *pretrain)
    assert flags.parse_arguments(["--stage", "1", *pretrain, "--mm_projector_type", "linear"])
    finetune = FINETUNE_SH
    for words in LEFT_OUT:
        finetune = finetune.replace(words, "")
    sentence = parse_error(capsys, "--stage", "2", *finetune.split())
    theirs = "--mm_projector_type linear --image_aspect_ratio square --group_by_modality_length False"
    assert f"mean {theirs}; here stage 2 means {' '.join(LEFT_OUT)}," in sentence
    arguments = flags.parse_arguments(["--stage", "2", *finetune.split(), *theirs.split()])
    assert arguments.model.mm_projector_type == "linear" and arguments.data.image_aspect_ratio == "square"
    sentence = parse_error(capsys, "--stage", "2", *FINETUNE_SH.split(), "--lora_enable", "True")  # its rate is 2e-5
    assert "mean --lora_r 64 --lora_alpha 16; here stage 2 means --lora_r 128 --lora_alpha 256," in sentence


def test_warmup_steps_and_eval_strategy_are_what_they_are_in_transformers(tmp_path):
    assert parse("--warmup_steps", "3").training.warmup_steps == 3
    assert warmup_steps(0.03, 100, 3) == 3 and warmup_steps(0.5, 100, 0.2) == 20 and warmup_steps(0.03, 100) == 3
    (tmp_path / "a.yaml").write_text("eval_strategy: no\n")
    for words in (["--eval_strategy", "no"], ["--config", str(tmp_path / "a.yaml")]):
        assert "evaluation_strategy" in parse(*words).explicit


def test_the_stage_may_stand_in_the_file(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("stage: 1\nseed: 3\n")
    words = [*MODEL, *DATA, "--config", str(tmp_path / "mine.yaml")]
    for command_line in (words, ["--stage", "1", *words]):
        arguments = flags.parse_arguments(command_line)
        assert (arguments.stage, arguments.training.learning_rate, arguments.training.seed) == (1, 1e-3, 3)
    assert flags.parse_for_a_tool(words, "tour").stage == 1
    assert flags.parse_for_a_tool([*MODEL, *DATA], "tour").stage == 2
    assert "contradicts --stage 2" in parse_error(capsys, "--stage", "2", *words)
    (tmp_path / "mine.yaml").write_text("stage: 3\n")
    assert "stage must be 1 or 2, not 3" in parse_error(capsys, *words)


def test_the_stage_is_needed(capsys):
    assert "--stage" in parse_error(capsys, *MODEL, *DATA)


@pytest.mark.parametrize(
    "words, missing",
    [
        (MODEL, "--data_path"),
        (DATA, "--model_name_or_path"),
        (MODEL[2:], "--model_name_or_path and --data_path"),
        (["--image_folder", "images"], "--model_name_or_path and --data_path"),
    ],
)
def test_some_but_not_all_of_model_and_data_is_an_error_that_names_the_rest(words, missing, capsys):
    assert f"{missing} missing" in parse_error(capsys, "--stage", "2", *words)


def test_fp16_alone_replaces_the_presets_bf16():
    training = parse("--fp16", "True").training
    assert (training.bf16, training.fp16) == (False, True)


# --- the global batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices, micro_batches", [(1, 8), (3, 3), (8, 1), (16, 1)])
def test_the_presets_global_batch_holds_on_any_number_of_devices(devices, micro_batches):
    assert choose_batch(parse(), devices) == (256, micro_batches, None)


@pytest.mark.parametrize("devices, actual", [(1, 128), (3, 384)])
def test_explicit_accumulation_decides_as_in_llava_and_says_so(devices, actual):
    batch, micro_batches, note = choose_batch(parse("--gradient_accumulation_steps", "4"), devices)
    assert (batch, micro_batches) == (actual, 4)
    assert f"The global batch is {actual} instead of the preset's 256" in note
    counted = f"{devices} device{'s' * (devices > 1)}"
    assert f"{counted} x --per_device_train_batch_size 32 x --gradient_accumulation_steps 4 = {actual}" in note


def test_explicit_accumulation_that_gives_the_presets_batch_is_not_remarked_on():
    assert choose_batch(parse("--gradient_accumulation_steps", "1"), 8) == (256, 1, None)


def test_a_global_batch_that_contradicts_explicit_accumulation_is_an_error():
    arguments = parse("--gradient_accumulation_steps", "4", "--global_batch_size", "100")
    with pytest.raises(ValueError, match=r"--global_batch_size 100 contradicts 3 devices x .* = 384\."):
        choose_batch(arguments, 3)


# --- precision and trackers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launched, bf16, fp16, explicit, precision",
    [
        (None, True, False, set(), "bf16"),
        ("no", True, False, set(), "bf16"),  # what a bare `accelerate launch` exports
        ("no", False, False, {"bf16"}, "no"),
        ("bf16", False, False, set(), "bf16"),
        ("fp16", True, False, set(), "fp16"),  # the preset's bf16 is not a wish of the user's
        ("fp16", False, True, {"fp16"}, "fp16"),
    ],
)
def test_precision_comes_from_accelerates_config_where_it_sets_one(
    launched, bf16, fp16, explicit, precision, monkeypatch
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert choose_precision(bf16, fp16, explicit) == precision


@pytest.mark.parametrize(
    "launched, bf16, fp16, explicit, sentence",
    [
        ("bf16", False, False, {"bf16"}, "--bf16 False contradicts the accelerate config's mixed_precision: bf16."),
        ("fp16", True, False, {"bf16"}, "--bf16 True contradicts the accelerate config's mixed_precision: fp16."),
        ("bf16", False, True, {"fp16"}, "--fp16 True contradicts the accelerate config's mixed_precision: bf16."),
        ("fp8", True, False, set(), "mixed_precision: fp8 of the accelerate config is unknown"),
    ],
)
def test_a_contradiction_with_accelerates_config_names_both(launched, bf16, fp16, explicit, sentence, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(ValueError, match=sentence):
        choose_precision(bf16, fp16, explicit)


@pytest.mark.parametrize("tracker", ["wandbb", "clearml"], ids=["unknown", "not installed"])
def test_a_tracker_that_cannot_report_is_refused(tracker):
    with pytest.raises(ValueError, match=f"--report_to {tracker}: not installed or unknown. Installed: .*tensorboard"):
        check_tracker(tracker)


# --- faults that the run finds ---------------------------------------------------------------------------------------


def write_records(path, *records) -> str:
    turns = lambda question: [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}]  # noqa: E731
    path.write_text(json.dumps([record | {"conversations": turns(record["conversations"])} for record in records]))
    return str(path)


@pytest.fixture(scope="module")
def failing_runs(tmp_path_factory):
    """Command lines of `python train.py` that must fail, started together: what each printed, and its exit code."""
    directory = tmp_path_factory.mktemp("faults")
    good = dict(id="good", conversations="<image>\nWhat?", image="wide_rgb.png")
    mark = write_records(directory / "mark.json", good, dict(id="no-image", conversations="<image>\nWhat?"))
    image = write_records(
        directory / "image.json", good, dict(id="no-mark", conversations="What?", image="wide_rgb.png")
    )
    gone = write_records(directory / "gone.json", good | dict(id="gone", image="gone.png"))
    (directory / "broken").mkdir()
    (directory / "broken" / "wide_rgb.png").write_bytes(b"not an image")
    (directory / "broken.json").write_text('[{"id": 1},')
    one = write_records(directory / "one.json", good)
    given = {
        "mark": dict(data_path=[mark]),
        "image": dict(data_path=[image]),
        "gone": dict(data_path=[gone]),
        "image file": dict(data_path=[one], image_folder=[directory / "broken"]),
        "broken json": dict(data_path=[directory / "broken.json"]),
        "no file": dict(data_path=[directory / "none.json"]),
        "no folder": dict(data_path=[one], image_folder=[directory / "none"]),
        "lists": dict(data_path=[one, one]),
        "template": dict(version="v7"),
        "projector": dict(mm_projector_type="mlp"),
        "adapter": dict(pretrain_mm_mlp_adapter=directory / "none.bin"),
        "order": dict(sample_order=directory / "none.json"),
        "flag": dict(learning_rte=1),
    }
    runs = {}
    for name, values in given.items():
        values = {
            "model_name_or_path": FIXTURES / "llm",
            "vision_tower": FIXTURES / "clip",
            "data_path": [one],
            "image_folder": [FIXTURES / "data" / "images"],
            "bf16": False,
            "max_steps": 1,
            "warmup_ratio": 0,
            "dataloader_num_workers": 1,
            "report_to": "none",
            "output_dir": directory / f"output of {name}",
        } | values
        words = ["--stage", "2"]
        for flag, value in values.items():
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
        runs[name] = start(words, directory / f"{name}.txt")
    return {name: (run.wait(), run.text) for name, run in runs.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, sentences",
    [
        ("mark", ["mark.json, record 1 (id no-image): it has 1 <image> mark for 0 images", "--on_bad_sample skip"]),
        ("image", ["image.json, record 1 (id no-mark): it has 0 <image> marks for 1 image", "--on_bad_sample skip"]),
        ("gone", ["gone.json, record 0 (id gone): the image 'gone.png' is not in the image folder"]),
        ("image file", ["one.json, record 0 (id good): the image ", "wide_rgb.png' cannot be read"]),
        ("broken json", ["broken.json is not a whole JSON array", "byte 11, line 1"]),
        ("no file", ["The data file ", "none.json (--data_path) does not exist."]),
        ("no folder", ["The image folder ", "none (--image_folder) does not exist."]),
        ("lists", ["--data_path lists 2 files and --image_folder 1 folder;", "one folder for each file"]),
        ("template", ["Unknown conversation template 'v7' (--version). Known: chatml_direct, "]),
        ("projector", ["--mm_projector_type 'mlp' is unknown. Known are linear, identity and mlpNx_gelu"]),
        ("adapter", ["There is no projector at ", "none.bin. --pretrain_mm_mlp_adapter takes"]),
        ("order", ["The order ", "none.json (--sample_order) does not exist."]),
        ("flag", ["unknown flag --learning_rte, did you mean --learning_rate?"]),
    ],
)
def test_what_a_person_can_mend_ends_the_run_with_a_sentence_and_no_traceback(name, sentences, failing_runs):
    code, text = failing_runs[name]
    assert code == (2 if name == "flag" else 1)
    assert "Traceback" not in text
    assert text.count("train.py: error: ") == 1
    message = " ".join(text.split("train.py: error: ")[1].split())
    for sentence in sentences:
        assert sentence in message


@pytest.mark.slow
def test_a_bug_keeps_its_traceback(tmp_path):
    # An activation that transformers does not know is nothing that a sentence was written about.
    model = tmp_path / "llm"
    model.mkdir()
    for file in (FIXTURES / "llm").iterdir():
        os.symlink(file, model / file.name)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "no_such_activation"}))
    words = f"--stage 2 --model_name_or_path {model} --vision_tower {FIXTURES / 'clip'} --bf16 False --report_to none"
    words += f" --data_path {FIXTURES / 'data/train_stage2.json'} --image_folder {FIXTURES / 'data/images'}"
    words += " --max_steps 40"  # more than one, whose learning rate would be 0
    run = start([*words.split(), "--output_dir", str(tmp_path / "output")], tmp_path / "bug.txt")
    assert run.wait() == 1
    assert "Traceback" in run.text
