"""The optimisations that `throughput.py --without NAME` turns off, one by one or together: by flag where there is one.

What has no flag in `train.py`, because nobody who trains would want it off, is replaced in the running program instead.
"""

import gc
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.image_processing_utils import BaseImageProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from mini_llava.data import loader
from mini_llava.data.collator import MicroBatch
from mini_llava.data.images import ImageReader, Picture, pad_to_square
from mini_llava.data.tokenization import IGNORE_INDEX
from mini_llava.image_files import load_image
from mini_llava.model import attention
from mini_llava.options import kernels
from mini_llava.training import backend


def all_logits() -> None:
    """Logits of all positions, of which most are then ignored."""
    collate = loader.collate

    def collate_for_all_logits(*arguments) -> MicroBatch:
        batch = collate(*arguments)
        rows, columns = batch["input_ids"].shape
        targets = torch.full((rows, columns), IGNORE_INDEX)
        targets[:, batch["logit_positions"]] = batch["targets"]
        return batch | {"logit_positions": torch.arange(columns), "targets": targets}

    loader.collate = collate_for_all_logits


def floats_from_the_loader() -> None:
    """Images are normalised in the loader's processes and travel as fp32, four times the bytes."""
    ImageReader.open = float_picture


def float_picture(reader: ImageReader, folder: str, name: str) -> Picture:
    """Return `float_pixels` as the trainer takes them; not in tiles."""
    return Picture(float_pixels(folder, name, reader.processor, reader.aspect_ratio)[None], reader.features)


def float_pixels(folder: str, name: str, processor: BaseImageProcessor, aspect_ratio: str) -> torch.Tensor:
    """Return an image file as float32 [3, H, W], all of it by the processor."""
    image = load_image(folder, name)
    if aspect_ratio == "pad":
        image = pad_to_square(image, tuple(int(mean * 255) for mean in processor.image_mean))
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def single_linear_layers() -> None:
    """ZeRO-3 gathers weights and reduces gradients of one linear layer after the other."""
    import deepspeed.utils

    deepspeed.utils.set_z3_leaf_module = lambda *_: None


def deepspeeds_own_settings() -> None:
    """Bucket sizes and what stays whole as DeepSpeed has them by default."""
    complete = backend.complete_deepspeed_config

    def complete_with_defaults(config: dict, *arguments) -> None:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        zero = DeepSpeedZeroConfig(stage=config["zero_optimization"]["stage"])
        config["zero_optimization"] |= {
            "reduce_bucket_size": zero.reduce_bucket_size,
            "stage3_prefetch_bucket_size": zero.prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.param_persistence_threshold,
            "stage3_max_live_parameters": zero.max_live_parameters,
            "stage3_max_reuse_distance": zero.max_reuse_distance,
        }
        complete(config, *arguments)

    backend.complete_deepspeed_config = complete_with_defaults


def segments_of_fixed_size() -> None:
    """The allocator's own way, in which tensors of changing sizes leave holes."""
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:False"


def whole_collections() -> None:
    """Python's garbage collector looks through the model and all libraries every time."""
    gc.freeze = lambda: None


def one_kernel_for_each_operation() -> None:
    """AdamW in a dozen kernels over lists of tensors."""
    build = train.build_adamw
    train.build_adamw = lambda *arguments, fused: build(*arguments, fused=False)


def kept_products() -> None:
    """The product inside the MLP is kept for backward."""
    kernels._DownOfProduct.apply = lambda product, gate, up, weight: F.linear(product(gate, up), weight)


def kept_norms() -> None:
    """The outputs of norms are kept for backward."""
    kernels.forget_outputs_of_norms = lambda *_: None


def flash_attention_2() -> None:
    """torch's own kernel, although FlashAttention 4 is installed."""
    attention._has_flash_4 = lambda: False


def pageable_memory() -> None:
    """Batches are copied to the device from ordinary memory, for which the host waits."""
    load = train.rank_step_loader
    train.rank_step_loader = lambda *arguments, pin_memory, **others: load(*arguments, pin_memory=False, **others)


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
    "images_as_bytes": floats_from_the_loader,
    "layerwise_gathers": single_linear_layers,
    "zero_settings": deepspeeds_own_settings,
    "expandable_segments": segments_of_fixed_size,
    "gc_freeze": whole_collections,
    "fused_adamw": one_kernel_for_each_operation,
    "recomputed_products": kept_products,
    "forgotten_norms": kept_norms,
    "flash_attention_4": flash_attention_2,
    "pinned_memory": pageable_memory,
}
NAMES = (*FLAGS, *FUNCTIONS)
WITH_A_GPU = (
    *("fast_attention", "flash_attention_4", "liger", "recomputed_products", "forgotten_norms"),
    *("expandable_segments", "fused_adamw", "pinned_memory"),
)
WITH_ZERO = ("layerwise_gathers", "zero_settings")


def turn_off(names: list[str]) -> list[str]:
    """Turns them off in this process, before anything of the run is made; returns the flags that do the rest.

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
