"""Runs of `train.py`'s own loop for the parity tests: their command lines, where they run, and what is read from them.

A run has a name. `curve/...` are the recorded runs of fixtures/curves with their sample order; `setting/...` are
others, which test_other_settings.py compares with a plain loop of its own.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train
from mini_llava import arguments as flags
from tests.launching import CONFIGS, train_in_turn
from tests.parity.golden import FIXTURES, load_json

GOLDEN_CURVES = [f"stage{stage}_{name}" for stage in (1, 2) for name in ("batch4", "batch4_accumulation2", "batch8")]
# Every cut of 8 samples into micro-batches, padded and packed, in one stage or the other: (stage, size, layout).
CUTS = [
    *((1, 8, "padded"), (1, 4, "packed"), (1, 2, "padded")),
    *((2, 8, "packed"), (2, 4, "padded"), (2, 2, "packed")),
]
COMMON = {
    "bf16": False,
    "tf32": False,
    "gradient_checkpointing": False,
    "dataloader_num_workers": 0,
    "report_to": "none",
    "save_strategy": "no",
    "model_name_or_path": FIXTURES / "llm",
    "vision_tower": FIXTURES / "clip",
    "image_folder": FIXTURES / "data" / "images",
}


# What two processes run under each backend, padded and packed; of ZeRO `uneven` is padded. `micro_batch` runs deal the
# original's micro-batches to two ranks as the original would.
TWO_PROCESSES = {
    "ddp": [
        "curve/stage2_batch8/4/padded",
        "curve/stage1_batch8/4/packed",
        "curve/stage2_batch4_accumulation2/4/micro_batch",
        "setting/0",
        "setting/uneven",
    ],
    "zero2": ["curve/stage2_batch8/2/packed", "setting/uneven"],
    "zero3": ["curve/stage2_batch8/2/packed", "curve/stage1_batch8/4/packed", "setting/uneven"],
}


@dataclass
class Run:
    """What a run left: the values of each step from log.jsonl, and the trained model's tensors under LLaVA's names."""

    losses: list[float]
    gradient_norms: list[float]
    learning_rates: list[float]
    tensors: dict[str, torch.Tensor]


def drawn_setting(seed: int) -> dict:
    """Flags of a run: the stage by turns, seed, rates, batch shape, decay, schedule, clipping and layout at random."""
    draw = random.Random(seed)
    stage = 1 if seed % 3 == 1 else 2
    per_device, batch = draw.randint(1, 5), draw.randint(3, 12)
    setting = {
        "stage": stage,
        "seed": draw.randrange(1000),
        "learning_rate": draw.choice((1e-3, 3e-3) if stage == 1 else (5e-5, 1e-4, 4e-4)),
        "weight_decay": draw.choice((0.0, 0.01, 0.1)),
        "per_device_train_batch_size": per_device,
        "global_batch_size": batch,
        "max_steps": 8,
        "warmup_ratio": draw.choice((0.0, 0.03, 0.3)),
        "lr_scheduler_type": draw.choice(("cosine", "linear", "constant")),
        "max_grad_norm": draw.choice((0.0, 0.5, 1.0)),
        "packing": draw.random() < 0.5,
        "image_aspect_ratio": draw.choice(("pad", "square")),
    }
    if stage == 2:
        setting["group_by_modality_length"] = draw.random() < 0.5
        if draw.random() < 0.5:
            setting["mm_projector_lr"] = 2e-5
    return setting


SETTINGS = {str(seed): drawn_setting(seed) for seed in range(6)} | {
    # A last batch of 4 in three micro-batches of two ranks: some ranks have nothing to do, others no image.
    "uneven": {
        **{"stage": 2, "seed": 5, "learning_rate": 2e-4, "weight_decay": 0.1, "num_train_epochs": 1.2},
        **{"per_device_train_batch_size": 2, "global_batch_size": 19, "packing": False},
    },
    "cut_at_170_tokens": {
        **{"stage": 2, "seed": 9, "learning_rate": 1e-4, "weight_decay": 0.05, "model_max_length": 170},
        **{"per_device_train_batch_size": 3, "global_batch_size": 6, "max_steps": 8, "packing": True},
    },
    "vision_tower_too": {
        **{"stage": 2, "seed": 6, "learning_rate": 1e-4, "weight_decay": 0.1, "mm_vision_tower_lr": 5e-5},
        **{"unfreeze_mm_vision_tower": True, "max_grad_norm": 0.3, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
        **{"per_device_train_batch_size": 3, "global_batch_size": 6, "max_steps": 8, "packing": True},
    },
    "projector_frozen": {
        **{"stage": 2, "seed": 8, "learning_rate": 2e-4, "freeze_mm_mlp_adapter": True, "max_steps": 6},
        **{"per_device_train_batch_size": 4, "global_batch_size": 4, "packing": False},
    },
    "mean_of_means": {
        **{"stage": 2, "seed": 4, "learning_rate": 3e-4, "weight_decay": 0.1, "loss_normalization": "micro_batch"},
        **{"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 8},
    },
}


def flags_of(name: str, folder: Path, projector: Path, processes: int) -> dict:
    """All flags of the run `name`; `folder` takes its output and, for a recorded one, its sample order."""
    kind, _, rest = name.partition("/")
    output_dir = folder / name.replace("/", "-")
    if kind == "setting":
        setting = SETTINGS[rest]
        start = {
            "data_path": FIXTURES / f"data/train_stage{setting['stage']}.json",
            "pretrain_mm_mlp_adapter": projector,
        }
        return {**COMMON, **start, **setting, "output_dir": output_dir}

    curve_name, size, layout = rest.split("/")
    curve = load_json(f"curves/{curve_name}.json")
    samples = sum(len(micro_batch["records"]) for micro_batch in curve["steps"][0]["micro_batches"])
    order = folder / f"{curve_name}.json"
    order.write_text(json.dumps(recorded_order(curve)))
    given = {
        key: curve["arguments"][key]
        for key in ("version", "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "max_grad_norm")
    }
    return {
        **COMMON,
        **given,
        "stage": int(curve_name[5]),
        "data_path": FIXTURES / curve["data"],
        "pretrain_mm_mlp_adapter": curve_start(curve_name, projector),
        "sample_order": order,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": samples // int(size) // processes,
        "loss_normalization": "micro_batch" if layout == "micro_batch" else "global_batch",
        "packing": layout == "packed",
        "output_dir": output_dir,
    }


def curve_start(curve_name: str, projector: Path) -> Path:
    """The projector a recorded run starts from: stage 2 continues a recorded stage 1."""
    return projector if curve_name.startswith("stage1") else FIXTURES / "curves" / "stage1_batch4_projector.safetensors"


def recorded_order(curve: dict) -> list[list[int]]:
    """The global batches of a recorded run, its micro-batches behind each other."""
    return [[index for micro in step["micro_batches"] for index in micro["records"]] for step in curve["steps"]]


def command_line(given: dict) -> list[str]:
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def train_here(name: str, folder: Path, projector: Path) -> Run:
    """Trains in this process."""
    given = flags_of(name, folder, projector, processes=1)
    AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier run in this process left
    train.train(flags.parse_arguments(command_line(given)))
    AcceleratorState._reset_state(reset_partial_state=True)
    return read_run(given["output_dir"])


def train_on_two(backend: str, name: str, folder: Path, projector: Path) -> Run:
    """Trains in two processes with a backend, `ddp` or a file of accelerate_configs."""
    given = flags_of(name, folder, projector, processes=2)
    train_in_turn(None if backend == "ddp" else CONFIGS / f"{backend}.yaml", [command_line(given)], folder)
    return read_run(given["output_dir"])


def read_run(output_dir: Path) -> Run:
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    series = [[line[key] for line in lines] for key in ("loss", "gradient_norm", "learning_rate")]
    if (output_dir / "model.safetensors").is_file():
        return Run(*series, llava_names(load_file(output_dir / "model.safetensors")))
    return Run(*series, torch.load(output_dir / "mm_projector.bin", weights_only=True))


def llava_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of transformers' layout under LLaVA's names, the embeddings without the rows that saving added."""
    vocabulary = load_json("llm/config.json")["vocab_size"]
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith("language_model."):
            name = name.removeprefix("language_model.")
        elif name.startswith("multi_modal_projector."):
            number = {"linear_1": 0, "linear_2": 2}[name.split(".")[1]]
            name = f"model.mm_projector.{number}.{name.split('.')[2]}"
        else:
            name = f"model.vision_tower.{name}"
        renamed[name] = tensor[:vocabulary] if name in ("lm_head.weight", "model.embed_tokens.weight") else tensor
    return renamed


def start_tensors(projector: Path) -> dict[str, torch.Tensor]:
    """What every run starts from, under LLaVA's names, in fp32."""
    tower = load_file(FIXTURES / "clip" / "model.safetensors")
    return {
        **load_file(FIXTURES / "llm" / "model.safetensors"),
        **load_file(projector),
        **{f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()},
    }
