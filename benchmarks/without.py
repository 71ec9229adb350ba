"""The optimisations that `throughput.py --without NAME` turns off, one by one or together: by flag where there is one.

The others are turned off from outside: by a DeepSpeed config, the environment, or torch's hooks.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from transformers.image_processing_utils import BaseImageProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.steps import on_model
from mini_llava.data.images import pad_to_square
from mini_llava.data.tokenization import IGNORE_INDEX
from mini_llava.image_files import load_image
from mini_llava.model.llava import LlavaModel


def all_logits() -> None:
    """Logits of all positions, of which most are then ignored."""

    def hook(model: LlavaModel) -> None:
        trained = []

        def everywhere(_model, args: tuple, batch: dict) -> tuple[tuple, dict]:
            trained[:] = [batch["logit_positions"]]
            targets = torch.full_like(batch["input_ids"], IGNORE_INDEX)
            targets[:, batch["logit_positions"]] = batch["targets"]
            positions = torch.arange(targets.shape[1], device=targets.device)
            return args, batch | {"logit_positions": positions, "targets": targets}

        def as_asked(_model, _args, losses: torch.Tensor) -> torch.Tensor:
            return losses[:, trained[0]] if losses.dim() else losses

        model.register_forward_pre_hook(everywhere, with_kwargs=True)
        model.register_forward_hook(as_asked)

    on_model(hook)


def deepspeeds_own_settings() -> None:
    """Bucket sizes and what stays whole as DeepSpeed has them by default."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = DeepSpeedZeroConfig(stage=int(os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"]))
    settings = {"reduce_bucket_size": zero.reduce_bucket_size}
    if zero.stage == 3:
        settings |= {
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.param_persistence_threshold,
            "stage3_max_live_parameters": zero.max_live_parameters,
            "stage3_max_reuse_distance": zero.max_reuse_distance,
        }
    set_zero(settings)


def set_zero(settings: dict) -> None:
    """Launch what follows in this process with these entries of a DeepSpeed config's `zero_optimization`.

    The others are those of the accelerate config that this process was launched with.
    """
    from accelerate import DeepSpeedPlugin

    config = DeepSpeedPlugin().deepspeed_config
    config["zero_optimization"] |= settings
    file = Path(tempfile.mkdtemp()) / "deepspeed.json"
    file.write_text(json.dumps(config))
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(file)
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # accelerate refuses a file beside entries of its own config


def segments_of_fixed_size() -> None:
    """The allocator's own way, in which tensors of changing sizes leave holes."""
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"


def one_kernel_for_each_operation() -> None:
    """AdamW in a dozen kernels over lists of tensors."""

    def unfuse(optimizer: Optimizer, *_) -> None:
        for group in optimizer.param_groups:
            group["fused"] = None
        for state in optimizer.state.values():
            state["step"] = state["step"].cpu()  # which only the fused kernel reads on the GPU

    register_optimizer_step_pre_hook(unfuse)


def float_pixels(folder: str, name: str, processor: BaseImageProcessor, aspect_ratio: str) -> torch.Tensor:
    """Return an image file as float32 [3, H, W], all of it by the processor."""
    image = load_image(folder, name)
    if aspect_ratio == "pad":
        image = pad_to_square(image, tuple(int(mean * 255) for mean in processor.image_mean))
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


# What is turned off: the flags of train.py that do it, or the function.
FLAGS = {
    "packing": ["--packing", "False"],
    "fast_attention": ["--attn_implementation", "sdpa"],
    "liger": ["--use_liger_kernel", "False"],
    "kept_activations": ["--gradient_checkpointing", "True", "--gradient_checkpointing_share", "1"],
    "half_the_kept_activations": ["--gradient_checkpointing", "True", "--gradient_checkpointing_share", "0.5"],
    "loader_processes": ["--dataloader_num_workers", "0"],
}
FUNCTIONS = {
    "trained_logits_only": all_logits,
    "zero_settings": deepspeeds_own_settings,
    "expandable_segments": segments_of_fixed_size,
    "fused_adamw": one_kernel_for_each_operation,
}
NAMES = (*FLAGS, *FUNCTIONS)
WITH_A_GPU = ("fast_attention", "liger", "expandable_segments", "fused_adamw")
WITH_ZERO = ("zero_settings",)


def turn_off(names: list[str]) -> list[str]:
    """Turn them off in this process, before anything of the run is made; return the flags that do the rest.

    Raises:
        ValueError: one of them is not on here anyway.
    """
    for name in names:
        if name in WITH_A_GPU and not torch.cuda.is_available():
            raise ValueError(f"--without {name}: it is on with a GPU only.")
        if name in WITH_ZERO and os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
            raise ValueError(f"--without {name}: it is on under DeepSpeed only.")
        if name in FUNCTIONS:
            FUNCTIONS[name]()
    return [flag for name in names for flag in FLAGS.get(name, [])]
