"""The frozen language model in 4 or 8 bits, by bitsandbytes: `--bits`, for LoRA and for stage 1."""

import importlib.util

import torch
from accelerate import Accelerator
from transformers import BitsAndBytesConfig

from ..errors import UserError
from ..training.backend import compute_dtype, zero_stage


def check_bitsandbytes(bits: int) -> None:
    """Raise UserError if weights are to be quantised and the package is not installed."""
    if bits != 16 and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--bits {bits} needs the package bitsandbytes: pip install bitsandbytes.")


def quantisation(accelerator: Accelerator, bits: int, double_quant: bool, quant_type: str) -> dict:
    """Return what `from_pretrained` needs to read the language model in 4 or 8 bits; nothing for 16.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if bits == 16:
        return {}
    check_bitsandbytes(bits)
    if bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype(accelerator),
        # ZeRO-3 divides the parameters of one dtype, so the packed bytes pass for numbers of the computation's.
        bnb_4bit_quant_storage=compute_dtype(accelerator) if zero_stage(accelerator) == 3 else torch.uint8,
    )
    return {"quantization_config": config}
