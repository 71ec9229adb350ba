"""`tools.plan` plans without weights, GPU or processes, refuses what cannot fit, and what it advises then fits."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig

import train
from benchmarks.random_setup import CLIP_L_336, LANGUAGE_MODELS, TINY_CLIP
from mini_llava import arguments as flags
from mini_llava.data.lengths import Lengths
from mini_llava.errors import UserError
from mini_llava.guards.longest import kept_of_a_position, longest_micro_batch
from mini_llava.model.vision_tower import VisionTower
from mini_llava.tools.memory import kept_of_a_picture
from mini_llava.tools.plan import MemoryAdvice, PlanArguments, main, parse_arguments, read_layout
from tests import forked_runs
from tests.end_to_end.runs import FIXTURES, flags_of, plan_here
from tests.families import FAMILIES, write_family
from tests.launching import CONFIGS
from tests.model.tiny_towers import save_tower


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory):
    """Two layers of Llama 7B and a small tower, directories without weights, and 100 records of 60 to 1,545 words."""
    folder = tmp_path_factory.mktemp("setup")
    llama = LANGUAGE_MODELS["7b"] | {"num_hidden_layers": 2}
    LlamaConfig(vocab_size=32_000, **llama).save_pretrained(folder / "language_model")
    for file in (FIXTURES / "llm").glob("*token*"):
        shutil.copy(file, folder / "language_model")
    CLIPVisionConfig(patch_size=14, **TINY_CLIP).save_pretrained(folder / "vision_tower")
    shutil.copy(FIXTURES / "clip" / "preprocessor_config.json", folder / "vision_tower")
    records = []
    for number in range(100):
        words = " ".join(["word"] * (60 + 15 * number))
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": words}]
        records.append({"image": f"absent-{number}.jpg", "conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))
    return folder


def plan(folder, **values) -> None:
    values = {
        "stage": 2,
        "model_name_or_path": folder / "language_model",
        "vision_tower": folder / "vision_tower",
        "data_path": folder / "records.json",
        "image_folder": folder,
        "output_dir": folder / "output",
        "gradient_checkpointing": False,
        "model_max_length": 2048,
        "warmup_ratio": 0,
        **values,
    }
    plan_here([text for name, value in values.items() for text in (f"--{name}", str(value))])


def test_a_plan_says_what_is_trained_how_long_it_takes_and_what_it_needs(without_weights, capsys):
    values = {"num_gpus": 8, "accelerate_config": CONFIGS / "zero3.yaml", "gpu_name": "A100", "expected_mfu": 0.4}
    plan(without_weights, **values, global_batch_size=64, num_train_epochs=2, save_steps=1, save_total_limit=1)
    printed = capsys.readouterr().out
    assert "8 GPUs of 79 GiB, ZeRO-3, bf16" in printed
    assert re.search(r"language_model +666,914,816 +666,914,816 +full +2e-05", printed)
    assert "Global batch: 64 samples on 8 GPUs" in printed
    assert re.search(r"100 records, 100 with images, [\d,]+ tokens: 4 steps, 2.00 epochs", printed)
    assert "if 40% of the 312 TFLOP/s of each A100" in printed
    assert "2 training states of 8.208 GB" in printed  # 12 bytes for each of 684 million parameters
    parts = {name: float(size) for size, name in re.findall(r"^ +(\d+\.\d\d) (.+)$", printed, re.MULTILINE)}
    total = parts.pop("GiB needed on each GPU")
    peak = parts.pop("peak_memory_gib of the log")
    assert sum(parts.values()) == pytest.approx(total, abs=0.05) and peak < total
    assert parts["gradients"] == pytest.approx(4 * 0.684e9 / 8 / 2**30, abs=0.01)
    assert "It fits: " in printed
    assert not (without_weights / "output").exists()  # nothing is written


@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_a_change_after_which_it_fits(without_weights, capsys):
    advised = []
    for too_little in (24, 15):
        given = {"gpu_memory_gib": too_little, "num_gpus": 2, "max_tokens_per_micro_batch": 24_000}
        given |= {"per_device_train_batch_size": 64}  # one micro-batch, if it fits
        given |= {"use_liger_kernel": False}  # it keeps less where it is installed
        with pytest.raises(ValueError, match=r"It does not fit: .* are needed and a GPU has ") as refused:
            plan(without_weights, **given)
        change = re.search(r"The first change that makes it fit: (.+)\.$", str(refused.value))[1]
        advised.append(change)
        for one in change.split(" and "):
            name, value = one.split()
            given |= {name.removeprefix("--").replace("config_file", "accelerate_config"): value}
        capsys.readouterr()
        plan(without_weights, **given)
        assert "It fits: " in capsys.readouterr().out
        assert re.fullmatch(r"--max_tokens_per_micro_batch \d+", advised[0])
    assert "zero3.yaml" in advised[1]  # DDP alone takes more


def test_every_image_of_a_record_takes_memory():
    length, trained, pictures = (np.array(values) for values in ([700, 2000, 300, 900], [50, 90, 90, 9], [1, 3, 0, 1]))
    lengths = Lengths(length, trained, pictures, bad={})
    assert lengths.has_image.tolist() == [True, True, False, True]
    for layout, columns in (("packed", 2700), ("padded", 2 * 2000)):
        shape = longest_micro_batch([[[[0, 1], [2, 3]]]], lengths, layout, 0.1, pictures_weigh=0.0).shape
        assert (shape.tokens, shape.images) == (columns, 4)


def test_a_trained_tower_makes_pictures_weigh_more_than_text():
    """A text of 3000 tokens against four pictures: of each CLIP keeps what a recomputed 7B keeps of 1,800 tokens."""
    with torch.device("meta"):
        tower = VisionTower(CLIPVisionModel(CLIPVisionConfig(patch_size=14, **CLIP_L_336)))
    llama = LlamaConfig(vocab_size=32_000, **LANGUAGE_MODELS["7b"])
    weigh = kept_of_a_picture(tower) / kept_of_a_position(llama, 1.0)
    assert 1000 < weigh < 3000
    lengths = Lengths(np.array([700] * 4 + [3000]), np.array([50] * 5), np.array([1] * 4 + [0]), bad={})
    for pictures_weigh, images in ((0.0, 1), (weigh, 4)):  # where there is none, a blank one counts
        longest = longest_micro_batch([[[[0, 1, 2, 3], [4]]]], lengths, "packed", 0.1, pictures_weigh)
        assert longest.shape.images == images


def test_nothing_is_advised_where_nothing_helps(without_weights):
    with pytest.raises(ValueError, match="Nothing that changes only the speed makes it fit, up to 64 GPUs and offload"):
        plan(without_weights, gpu_memory_gib=2)


def test_stage_1_lora_and_ddp_can_be_planned(without_weights, capsys):
    plan(without_weights, stage=1, version="plain", tune_mm_mlp_adapter=True, mm_use_im_start_end=True)
    assert re.search(r"new_tokens +8,192 +8,192 +full", capsys.readouterr().out)
    plan(without_weights, lora_enable=True, bits=4, num_gpus=2, per_device_train_batch_size=4, packing=False)
    printed = capsys.readouterr().out
    assert "2 GPUs of 79 GiB, DDP, bf16" in printed and "padded" in printed
    assert re.search(r"DDP's buckets, a copy of all gradients", printed)
    weights = float(re.search(r"^ +(\d\.\d\d) weights$", printed, re.MULTILINE)[1])
    adapters = 4 * 128 * 2 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # fp32, rank 128, two layers
    four_bits, half = 0.5625 * 2 * 202_375_168, 2 * 262_144_000  # quantised layers; word embeddings and head
    projector = 4 * 17_047_552
    assert weights == pytest.approx((adapters + four_bits + half + projector) / 2**30, abs=0.02)


def test_the_layout_is_that_of_the_file_or_of_the_launcher(tmp_path, monkeypatch):
    def layout(**values):
        return read_layout(PlanArguments(**values), flags.TrainingArguments(bf16=True), set())

    assert (layout().gpus, layout().zero_stage) == (1, 0)
    offload = layout(accelerate_config=str(CONFIGS / "zero3_offload.yaml"), num_gpus=4)
    assert (offload.gpus, offload.zero_stage) == (4, 3)
    assert offload.offloads("optimizer") and offload.offloads("param")
    zero2 = layout(accelerate_config=str(CONFIGS / "zero2.yaml"))
    assert (zero2.gpus, zero2.zero_stage, zero2.offloads("optimizer")) == (8, 2, False)

    (tmp_path / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}}))
    config = yaml.safe_load((CONFIGS / "zero3.yaml").read_text())
    config["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "deepspeed.json"), "zero3_init_flag": True}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    assert layout(accelerate_config=str(tmp_path / "own.yaml")).zero["reduce_bucket_size"] == 7
    with pytest.raises(ValueError, match=r"absent.yaml is no config file of accelerate \(FileNotFoundError"):
        layout(accelerate_config="absent.yaml")

    for name, value in {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "2"}.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert (layout().gpus, layout().zero_stage) == (16, 2)


def test_train_names_the_command_that_plans(capsys):
    for words in (["--dry_run"], ["--num_gpus", "8"]):
        with pytest.raises(SystemExit):
            flags.parse_arguments(["--stage", "2", *words])
        assert f"{words[0]} is not a flag here: " in (said := capsys.readouterr().err)
        assert "python -m mini_llava.tools.plan" in said


def test_the_command_says_what_it_refuses_and_plans_on_the_first_rank_alone(without_weights, capsys, monkeypatch):
    words = ["--stage", "1", "--num_gpus", "0"]
    assert main(words) == 1
    assert capsys.readouterr().err == "plan: error: --num_gpus must be positive, not 0.\n"
    with pytest.raises(SystemExit):
        parse_arguments(["--stage", "2", "--learning_rat", "1"])
    assert capsys.readouterr().err == "plan: error: unknown flag --learning_rat, did you mean --learning_rate?\n"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(words) == 0 and not any(capsys.readouterr())


def test_a_model_that_no_attention_can_run_is_not_planned(without_weights, tmp_path):
    model = shutil.copytree(without_weights / "language_model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"num_key_value_heads": 5}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has num_attention_heads 32, which is not a multiple of num_key_value_heads 5"):
        plan(without_weights, model_name_or_path=model)


@pytest.mark.slow
def test_a_run_that_has_no_memory_ends_before_step_1_with_a_change_to_make(tmp_path):
    """Out of the CPU's memory here: one packed row of 30,000 tokens has an attention mask of 900 million."""
    turns = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "word " * 2000}]
    (tmp_path / "records.json").write_text(json.dumps([{"conversations": turns}] * 16))
    values = {"data_path": tmp_path / "records.json", "model_max_length": 2048, "max_steps": 2, "save_steps": 1}
    values |= {"per_device_train_batch_size": 16, "global_batch_size": 16}

    output = tmp_path / "output"
    run = forked_runs.start(flags_of(2, output, values), tmp_path / "printed", inside=_with_two_gigabytes_more)
    run.wait_until_all_have_ended(grace=60)
    assert run.process.exitcode == 1
    assert "train.py: error on rank 0: Memory has run out (" in run.text and "Traceback" not in run.text, run.text
    change = re.search(
        r"The first change that makes it fit: (.+?)\. The same flags with python -m mini_llava", run.text
    )
    assert change, run.text
    assert not list(output.glob("checkpoint-*")) and not (output / "log.jsonl").exists()


def test_memory_that_runs_out_while_the_model_is_made_gets_the_same_advice(tmp_path, monkeypatch):
    """A real card is full at AdamW's moments, say, before any micro-batch is tried."""

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(train.backend, "create_moments", full)
    advice = MemoryAdvice()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(torch.OutOfMemoryError) as error:
        train.train(flags.parse_arguments(flags_of(2, tmp_path, {"warmup_ratio": 0})), advice)
    AcceleratorState._reset_state(reset_partial_state=True)
    sentence = advice.sentence(error.value)
    assert sentence.startswith("Memory has run out (CUDA out of memory). The longest micro-batch has 1,532 tokens. ")


def _with_two_gigabytes_more() -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def test_capped_scores_another_tower_and_images_in_tiles_can_be_planned(tmp_path, capsys):
    """Gemma 2 runs with eager attention; SigLIP has no class token; anyres adds a trained row and tiles."""
    language_model = write_family(FAMILIES["gemma_2"], tmp_path / "gemma_2")
    values = {
        "model_name_or_path": language_model,
        "version": "chat_template",
        "warmup_ratio": 0,
        "vision_tower": save_tower("siglip", tmp_path / "siglip"),
        "image_aspect_ratio": "anyres",
        "unfreeze_mm_vision_tower": True,
    }
    plan_here(flags_of(2, tmp_path / "output", values))
    printed = capsys.readouterr().out
    assert re.search(r"image_newline +32 +32 +full", printed), printed
    # Of 80 records in 8 micro-batches.
    assert int(re.search(r"Longest micro-batch: [\d,]+ tokens, (\d+) images", printed)[1]) > 2 * 80 / 8
    assert "It fits: " in printed
