"""The frozen language model in 4 or 8 bits, by bitsandbytes: `--bits`, with LoRA."""

import torch
from accelerate import Accelerator
from transformers import BitsAndBytesConfig

from ..training.backend import compute_dtype, zero_stage
from .packages import check_bitsandbytes


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
