"""The same training by LLaMA-Factory: what `against_llama_factory.py` measures this project against, and starts.

    PYTHONPATH=SITE python benchmarks/llama_factory.py --setup /tmp/bench --convert
    PYTHONPATH=SITE python -m torch.distributed.run --nproc_per_node 2 benchmarks/llama_factory.py \
        --setup /tmp/bench --steps 8 --output_dir /tmp/bench/run cutoff_len=13824 gradient_accumulation_steps=4

It runs with LLaMA-Factory's packages, and so imports nothing of this project. The first command writes `SETUP/peer`:
the weights under `LlavaForConditionalGeneration`'s names with a new projector, the tokenizer with `<image>`, and the
records as LLaMA-Factory reads them. The second is LLaMA-Factory's own `run_exp` with a clock beside it, and ends before
the result is saved; `log.jsonl` has `train.py`'s keys. Arguments of LLaMA-Factory may follow as key=value.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    TrainerCallback,
)

NEW_ROWS = 64  # for <image> and padding, as in llava-hf's checkpoints
RECORDS_A_GLOBAL_BATCH = 128  # as near as packs allow
FILLED = 0.985  # of a pack


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--setup", type=Path, required=True, help="what random_setup.py wrote")
    parser.add_argument("--convert", action="store_true", help="write SETUP/peer, and train nothing")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--output_dir", type=Path, help="of the run, default SETUP/peer/output")
    parser.add_argument(
        "--zero", type=int, choices=(0, 2, 3), help="DeepSpeed's stage; default 3 on several GPUs, else 0"
    )
    parser.add_argument("more", nargs="*", help="arguments of LLaMA-Factory, key=value")
    own = parser.parse_args()
    peer = own.setup / "peer"
    if own.convert:
        convert_models(own.setup, peer / "model")
        convert_records(own.setup, peer / "data")
        return
    more = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in own.more)}
    train(peer, own.output_dir or peer / "output", own.steps, own.zero, more)


def convert_models(setup: Path, directory: Path) -> None:
    """Writes language model, vision tower and a new projector as one checkpoint of transformers' LLaVA, in bf16."""
    directory.mkdir(parents=True, exist_ok=True)
    text, vision = (AutoConfig.from_pretrained(setup / part) for part in ("language_model", "vision_tower"))
    vision = getattr(vision, "vision_config", vision)
    has_class_token = vision.model_type == "clip_vision_model"
    image_token, text.vocab_size = text.vocab_size, text.vocab_size + NEW_ROWS
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if has_class_token else "full",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    config.dtype, config.architectures = torch.bfloat16, ["LlavaForConditionalGeneration"]
    config.save_pretrained(directory)

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlavaForConditionalGeneration(config).state_dict().items()}
    if text.tie_word_embeddings:
        del shapes["lm_head.weight"]
    level = "vision_model." if any(".vision_tower.vision_model." in name for name in shapes) else ""
    torch.manual_seed(0)
    bound = {"linear_1": vision.hidden_size**-0.5, "linear_2": text.hidden_size**-0.5}
    projector = {
        name: torch.empty(shape).uniform_(-bound[name.split(".")[-2]], bound[name.split(".")[-2]]).bfloat16()
        for name, shape in shapes.items()
        if "multi_modal_projector" in name
    }
    parts = ("language_model", "vision_tower")
    files = [file for part in parts for file in sorted((setup / part).glob("*.safetensors"))]
    weight_map = {}
    for number, file in enumerate(files):
        tensors = projector if number == 0 else {}
        for name, tensor in load_file(file).items():
            if file.parent.name == "vision_tower":
                name = f"model.vision_tower.{level}{name.removeprefix('vision_model.')}"
            elif name != "lm_head.weight":
                name = f"model.language_model.{name.removeprefix('model.')}"
            if name.endswith(("lm_head.weight", "embed_tokens.weight")):
                mean = tensor.float().mean(dim=0, keepdim=True).to(tensor.dtype)
                tensor = torch.cat([tensor, mean.expand(NEW_ROWS, -1)])
            if tensor.shape != shapes.pop(name, None):
                raise SystemExit(f"{file}: {name} {list(tensor.shape)} is not what transformers' LLaVA has there.")
            tensors[name] = tensor
        written = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        save_file(tensors, directory / written, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, written)
    if missing := set(shapes) - set(projector):
        raise SystemExit(f"{setup}: no weights for {sorted(missing)[:3]} of transformers' LLaVA.")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(setup / "language_model" / "tokenizer.json"),
        **dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>", padding_side="right"),
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor if has_class_token else SiglipImageProcessor
    LlavaProcessor(
        image_processor=images.from_pretrained(setup / "vision_tower"),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(has_class_token),
        image_token="<image>",
    ).save_pretrained(directory)


def convert_records(setup: Path, directory: Path) -> None:
    """Writes stage 2's records as ShareGPT's with a list of images."""
    directory.mkdir(parents=True, exist_ok=True)
    folder = (setup / "images").resolve()
    records = [
        {
            "conversations": record["conversations"],
            "images": [str(folder / record["image"])] if "image" in record else [],
        }
        for record in json.loads((setup / "stage2.json").read_text())
    ]
    (directory / "records.json").write_text(json.dumps(records))
    columns = {"messages": "conversations", "images": "images"}
    described = {"records": {"file_name": "records.json", "formatting": "sharegpt", "columns": columns}}
    (directory / "dataset_info.json").write_text(json.dumps(described))


def train(peer: Path, output_dir: Path, steps: int, zero: int | None, more: dict) -> None:
    """Trains, and writes `log.jsonl`."""
    from llamafactory.train.tuner import run_exp

    output_dir.mkdir(parents=True, exist_ok=True)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    arguments = settings(peer, world_size, zero, more) | {"output_dir": str(output_dir), "max_steps": steps}
    clock = Clock()
    try:
        run_exp(arguments | more, callbacks=[clock])
    except Trained as trained:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if int(os.environ.get("RANK", 0)) == 0:
            (output_dir / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in trained.log))


def settings(peer: Path, world_size: int, zero: int | None, more: dict) -> dict:
    """Full fine-tuning with the tower frozen, at LLaMA-Factory's fastest that this comparison's author found.

    A pack is a whole micro-batch, which `neat_packing` wants. Where the GPU has the memory nothing is recomputed. Liger
    comes through transformers: LLaMA-Factory's own `enable_liger_kernel` gives LLaVA the fused loss only.
    """
    on_gpu = torch.cuda.is_available()
    is_large = on_gpu and torch.cuda.get_device_properties(0).total_memory > 120 * 2**30
    cutoff = more.get("cutoff_len", 13824 if is_large else 9216)
    records = json.loads((peer / "data" / "records.json").read_text())
    used = len(records) // 1000 * 1000 or len(records)
    image_tokens = json.loads((peer / "model" / "config.json").read_text())["image_seq_length"]
    words = sum(len(turn["value"].split()) for record in records for turn in record["conversations"])
    length = (words + image_tokens * sum(len(record["images"]) for record in records)) / len(records)
    micro_batches = max(1, round(RECORDS_A_GLOBAL_BATCH / (FILLED * cutoff / length) / world_size))
    arguments = {
        "model_name_or_path": str(peer / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "freeze_vision_tower": True,
        "freeze_multi_modal_projector": False,
        "dataset": "records",
        "dataset_dir": str(peer / "data"),
        "template": "llava",
        "cutoff_len": cutoff,
        "packing": True,
        "neat_packing": True,
        "flash_attn": "fa2" if on_gpu else "sdpa",
        "enable_liger_kernel": False,
        "use_liger_kernel": on_gpu,
        "disable_gradient_checkpointing": is_large,
        # Packs are made of the records of one group: whole groups of 1,000, as a large data set has.
        "max_samples": used,
        "preprocessing_batch_size": 1000,
        "preprocessing_num_workers": max(1, used // 1000),
        "overwrite_cache": True,
        "dataloader_num_workers": 8 if on_gpu else 0,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "plot_loss": False,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": micro_batches,
        "learning_rate": 2e-5,
        "weight_decay": 0.0,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "bf16": True,
        "optim": "adamw_torch_fused" if on_gpu else "adamw_torch",
        "seed": 42,
    }
    arguments |= {"tf32": True} if on_gpu else {"use_cpu": True}
    stage = zero if zero is not None else 3 if world_size > 1 else 0
    if stage:
        arguments["deepspeed"] = deepspeed_config(stage, is_large)
    return arguments


def deepspeed_config(stage: int, is_large: bool) -> dict:
    """LLaMA-Factory's example of this stage, with communication overlapped and larger buckets."""
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": int(2.5e8)}
    if stage == 3:
        zero |= {
            "sub_group_size": int(1e9),
            "stage3_prefetch_bucket_size": int(2.5e8),
            "stage3_param_persistence_threshold": int(1e6),
            "stage3_max_live_parameters": int(3e9 if is_large else 1e9),
            "stage3_max_reuse_distance": int(3e9 if is_large else 1e9),
        }
    config = {"zero_allow_untested_optimizer": True, "bf16": {"enabled": "auto"}, "zero_optimization": zero}
    return config | dict.fromkeys(auto, "auto")


class Trained(Exception):
    """Ends LLaMA-Factory's run after its last step, before it saves; `log` has a dictionary for each step."""

    def __init__(self, log: list[dict]):
        self.log = log


class Clock(TrainerCallback):
    """When each step ended on the device, and how many records and tokens the model was given in it."""

    def __init__(self):
        self.times: list[float] = []
        self.given: list[torch.Tensor] = []  # int64 [samples, real tokens, computed tokens] for each micro-batch
        self.steps: list[torch.Tensor] = []

    def on_train_begin(self, *_, model, **__) -> None:
        model.register_forward_pre_hook(self.count, with_kwargs=True)
        self._tick()

    def count(self, _model, _arguments: tuple, inputs: dict) -> None:
        """Add a micro-batch. FlashAttention gets packs without their padding; other attention a mask [n, 1, t, t]."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool)
        if mask is not None:
            real = mask.diagonal(dim1=-2, dim2=-1)[:, 0] == 0 if mask.dim() == 4 else mask.bool()
        starts = (inputs["position_ids"] == 0) & real
        self.given.append(torch.stack([starts.sum(), real.sum(), torch.tensor(ids.numel(), device=ids.device)]))

    def on_step_end(self, *_, **__) -> None:
        self.steps.append(torch.stack(self.given).sum(dim=0))
        self.given = []
        self._tick()

    def on_train_end(self, _args, state, _control, **_) -> None:
        given, memory = torch.stack(self.steps), torch.zeros(1)
        if torch.cuda.is_available():
            memory = torch.tensor([torch.cuda.max_memory_allocated() / 2**30], device="cuda")
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(given)
            torch.distributed.all_reduce(memory, torch.distributed.ReduceOp.MAX)
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        log = []
        for number, (samples, real, computed) in enumerate(given.tolist()):
            seconds = self.times[number + 1] - self.times[number]
            values = {
                "step": number + 1,
                "loss": losses[number],
                "seconds_per_step": seconds,
                "samples_per_second": samples / seconds,
                "tokens_per_second": real / seconds,
                "computed_tokens_per_second": computed / seconds,
                "peak_memory_gib": memory.item(),
            }
            log.append(values)
        raise Trained(log)

    def _tick(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


if __name__ == "__main__":
    main()
