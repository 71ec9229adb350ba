"""The runs of `train.py` that the tests here compare, on tiny models in fp32, and how they are started.

A run is named, and its name means the same command line for every backend. On two processes each has to say that it ran
as what was asked for.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file

import train
from mini_llava import arguments as flags
from mini_llava.tools import plan
from mini_llava.training.checkpoint import read_manifest
from tests.launching import CONFIGS, ROOT, train_in_turn

FIXTURES = ROOT / "tests" / "parity" / "fixtures"

MODEL_AND_DATA = {
    "model_name_or_path": FIXTURES / "llm",
    "vision_tower": FIXTURES / "clip",
    "image_folder": FIXTURES / "data" / "images",
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_num_workers": 0,
    "report_to": "none",
}


def flags_of(stage: int, output_dir: Path, values: dict) -> list[str]:
    """A command line of `train.py`."""
    data_path = FIXTURES / "data" / f"train_stage{stage}.json"
    values = {"stage": stage, "data_path": data_path, **MODEL_AND_DATA, **values, "output_dir": output_dir}
    lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [str(text) for name, value in lists.items() for text in (f"--{name}", *value)]


# --- one optimizer step, whose gradient is kept ----------------------------------------------------------------------

RECORDS = json.loads((FIXTURES / "data" / "train_stage2.json").read_text(encoding="utf-8"))
IMAGES = [index for index, record in enumerate(RECORDS) if "image" in record]
TEXTS = [index for index, record in enumerate(RECORDS) if "image" not in record]
GLOBAL_BATCHES = {
    "2-images-2-texts": [IMAGES[0], TEXTS[0], IMAGES[1], TEXTS[1]],
    "6-images-1-text": [*IMAGES[2:8], TEXTS[2]],
    "4-texts": TEXTS[3:7],
    "4-images": IMAGES[8:12],
    "1-image-2-texts": [IMAGES[12], TEXTS[7], TEXTS[8]],
    "1-image": [IMAGES[13]],
    "1-text": [TEXTS[9]],
}
# AdamW with beta1 = 0 has the step's gradient as its first moment, which the training state keeps; with a learning rate
# of 0 every step starts from the same weights. So each step of such a run tells the gradient of one global batch, just
# as the loop made it.
KEEP_GRADIENTS = {
    "adam_beta1": 0,
    "learning_rate": 0,
    "allow": "learning_rate",
    "max_grad_norm": 0,
    "save_steps": 1,
    "unfreeze_mm_vision_tower": True,
}


def _cut(slots: int, packing: bool, **more) -> dict:
    """Dealt into this many slots, ranks times micro-batches."""
    return KEEP_GRADIENTS | {"global_batch_size": slots, "per_device_train_batch_size": 1, "packing": packing} | more


WHOLE = "1-slot-padded"
CUTS = {
    WHOLE: KEEP_GRADIENTS | {"global_batch_size": 8, "per_device_train_batch_size": 8, "packing": False},
    "2-slots-padded": _cut(2, packing=False),
    "3-slots-padded": _cut(3, packing=False),
    "4-slots-padded": _cut(4, packing=False),
    "1-slot-packed": KEEP_GRADIENTS | {"global_batch_size": 8, "per_device_train_batch_size": 8, "packing": True},
    "2-slots-packed": _cut(2, packing=True),
    "4-slots-packed": _cut(4, packing=True),
    "200-tokens-packed": _cut(2, packing=True, max_tokens_per_micro_batch=200),
    "300-tokens-padded-recomputed": _cut(2, packing=False, max_tokens_per_micro_batch=300, gradient_checkpointing=True),
}

# --- five steps, whose weights are compared --------------------------------------------------------------------------

# Nothing at its default that a backend could lose: rates, decay and moments all differ from AdamW's own. The rates are
# high because the weights of norms are about 1, where fp32 has steps of 1e-7: a change of 1e-3 would be known to 1e-4.
FIVE_STEPS = {
    "max_steps": 5,
    "learning_rate": 1e-2,
    "mm_projector_lr": 2e-2,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-4,  # large, so that the size of a clipped gradient matters
    "warmup_ratio": 0.3,
    "global_batch_size": 8,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
}
CLIP_AT = 0.1
CHANGES = {
    "clipped": {"max_grad_norm": CLIP_AT},
    "unclipped": {"max_grad_norm": 0},
    "bf16": {"bf16": True},
}
# Without dropout, for each rank draws masks of its own.
LORA = {
    "lora_enable": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0,
    "gradient_checkpointing": True,
    "max_grad_norm": 0,
}

RUNS = {f"gradients-{name}": (2, values) for name, values in CUTS.items()} | {
    f"stage{stage}-{name}": (stage, FIVE_STEPS | values) for stage in (1, 2) for name, values in CHANGES.items()
}
RUNS |= {"stage2-lora": (2, FIVE_STEPS | LORA)}
# All others try the longest micro-batch before step 1.
RUNS |= {"untried-stage2-clipped": (2, FIVE_STEPS | CHANGES["clipped"] | {"longest_batch_first": False})}
# Evaluated before, between and after the steps, on so few records that one rank has none of the last batch.
RUNS |= {"evaluated-stage2-clipped": (2, FIVE_STEPS | CHANGES["clipped"] | {"eval_steps": 2})}
# Either stage, clipped and unclipped, padded and packed under DDP and under ZeRO-3, not each with each of the others.
ON_TWO_PROCESSES = {
    "ddp": [
        *(f"gradients-{cut}" for cut in ("2-slots-padded", "4-slots-packed")),
        *("stage1-unclipped", "stage2-clipped"),
        *("stage2-lora", "untried-stage2-clipped", "evaluated-stage2-clipped"),
    ],
    "zero2": [
        *("gradients-4-slots-padded", "gradients-2-slots-packed"),
        *("stage2-clipped", "stage2-lora", "untried-stage2-clipped"),
    ],
    "zero3": [
        *(f"gradients-{cut}" for cut in ("2-slots-padded", "4-slots-packed")),
        *("stage1-clipped", "stage2-clipped", "stage2-unclipped", "stage1-bf16"),
        *("stage2-lora", "untried-stage2-clipped", "evaluated-stage2-clipped"),
    ],
    "zero3_offload": ["stage2-clipped", "untried-stage2-clipped"],
}
# Two files: questions with and without a picture whose answer is a word, and others whose answer is a letter.
HELD_OUT = {
    "words": [
        {**{key: RECORDS[index][key] for key in ("id", "image") if key in RECORDS[index]}, "conversations": turns}
        for index in (*IMAGES[:3], *TEXTS[:2])
        for turns in [[RECORDS[index]["conversations"][0], {"from": "gpt", "value": "seven"}]]
    ],
    "letters": [
        {
            "id": f"letter {number}",
            "image": RECORDS[IMAGES[number]]["image"],
            "metric": "choice",
            "conversations": [{"from": "human", "value": "<image>\nA or B?"}, {"from": "gpt", "value": "B"}],
        }
        for number in range(2)
    ],
}


def held_out_flags(folder: Path) -> dict:
    """Writes both files of held-out records; the flags that name them."""
    for name, records in HELD_OUT.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    paths = [folder / f"{name}.json" for name in HELD_OUT]
    folders = [FIXTURES / "data" / "images"] * len(paths)
    return {"eval_data_path": paths, "eval_image_folder": folders, "per_device_eval_batch_size": 2}


DESCRIPTIONS = {
    "ddp": "DDP",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
    "zero3_offload": "DeepSpeed ZeRO-3",
}


def command_line(name: str, folder: Path) -> list[str]:
    stage, values = RUNS[name]
    if name.startswith("gradients"):
        order = folder / "global_batches.json"
        order.write_text(json.dumps(list(GLOBAL_BATCHES.values())))
        values = values | {"sample_order": order, "max_steps": len(GLOBAL_BATCHES)}
    if name.startswith("evaluated"):
        values = values | held_out_flags(folder)
    return flags_of(stage, folder / name, values)


def train_here(command_line: list[str]) -> None:
    """`python train.py ...` in this process, on the CPU."""
    AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier run left behind
    # For this run alone: launched ones would inherit it, and accelerate would then leave DeepSpeed out.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        train.train(flags.parse_arguments(command_line))


def plan_here(command_line: list[str]) -> None:
    """`python -m mini_llava.tools.plan ...` in this process; what it refuses is raised."""
    plan.plan(*plan.parse_arguments(command_line))


def train_on_two(backend: str, name: str, folder: Path) -> None:
    """A run of a backend, into the folder of its name."""
    config = None if backend == "ddp" else config_file(backend, folder)
    printed = train_in_turn(config, [command_line(name, folder)], folder)
    assert f"2 processes, {DESCRIPTIONS[backend]}, " in printed, printed


def config_file(backend: str, folder: Path) -> Path:
    """The config that users take, but with limits so low that models of this size are really divided."""
    config = yaml.safe_load((CONFIGS / f"{backend}.yaml").read_text())
    stage = config["deepspeed_config"]["zero_stage"]
    zero = {"stage": stage, "reduce_bucket_size": 20_000}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 20_000}
        for part in ("optimizer", "param"):
            zero[f"offload_{part}"] = {"device": config["deepspeed_config"][f"offload_{part}_device"]}
    deepspeed_file = folder / "deepspeed.json"
    deepspeed_file.write_text(json.dumps({"zero_optimization": zero}))
    initialisation = config["deepspeed_config"]["zero3_init_flag"]
    config["deepspeed_config"] = {"deepspeed_config_file": str(deepspeed_file), "zero3_init_flag": initialisation}
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# --- what a run left -------------------------------------------------------------------------------------------------


def gradients(run: Path, batch: str) -> dict[str, torch.Tensor]:
    """The gradient of every trained parameter for one of the global batches of a gradient run."""
    step = 1 + list(GLOBAL_BATCHES).index(batch)
    return first_moments(run / f"checkpoint-{step}")


def is_rounding(name: str) -> bool:
    """Whether the gradient of a parameter is zero but for rounding, which other kernels may round to zero itself.

    The same shift of all keys changes no attention weight. (With rotary embeddings it is not the same for all.)
    """
    return name.startswith("vision_tower") and name.endswith("k_proj.bias")


def first_moments(checkpoint: Path) -> dict[str, torch.Tensor]:
    """AdamW's first moment of every trained parameter, flat, put together from the pieces of all ranks."""
    manifest = read_manifest(checkpoint)
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {name: [] for name in manifest["parameters"]}
    for path in checkpoint.glob("state-rank*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, kind, start = key.rsplit("|", 2)
                if kind == "exp_avg":
                    pieces[name].append((int(start), file.get_tensor(key)))
    whole = {name: torch.cat([piece for _, piece in sorted(found)]) for name, found in pieces.items()}
    for name, shape in manifest["parameters"].items():
        assert whole[name].numel() == torch.Size(shape).numel(), name
    return whole


def saved_weights(run: Path) -> dict[str, torch.Tensor]:
    """The result of a run: its projector and, of a second stage, the whole model or the adapter."""
    file = next(run / name for name in ("mm_projector.bin", "non_lora_trainables.bin") if (run / name).exists())
    weights = {f"{file.name}/{name}": tensor for name, tensor in torch.load(file, weights_only=True).items()}
    for name in ("model.safetensors", "adapter_model.safetensors"):
        if (run / name).exists():
            weights |= load_file(run / name)
    return weights


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def on_two_processes(prefix: str) -> list[tuple[str, str]]:
    """(backend, run) of all runs whose name begins so."""
    pairs = ((backend, run) for backend, names in ON_TWO_PROCESSES.items() for run in names)
    return [(backend, run) for backend, run in pairs if run.startswith(prefix)]
