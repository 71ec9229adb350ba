"""Which attention implementation a run uses: as asked, or the fastest one that computes the same here.

In packed rows attention must never cross the bounds of a sample. Three implementations keep to them:
`flash_attention_2` where its package is installed; `varlen` (`model/attention.py`) on any recent GPU; `sdpa` everywhere
else, for which transformers builds a block-diagonal mask from the restarting positions (a mask of L x L, so it is meant
for CPUs and short rows).
"""

import torch
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

from ..errors import UserError
from ..model.attention import varlen_attention
from .packages import check_flash_attention

AttentionInterface.register("varlen", varlen_attention)

# Families whose packed logits were compared with the unpacked ones; others (OPT, MPT) silently ignore the bounds.
PACKABLE = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "llama",
    "mistral",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
# They cap attention scores, which torch's kernels cannot.
CAPPED = ("gemma2",)


def choose_attention(
    requested: str | None, model_type: str, packing: bool, device: torch.device, half_precision: bool
) -> str | None:
    """Return the `attn_implementation` to load the language model with; None: transformers' own for this family.

    Raises:
        UserError: the request cannot run here, or this family of models cannot be packed.
    """
    if packing and model_type not in PACKABLE:
        raise UserError(
            f"Packing is not known to keep samples apart in models of type {model_type!r} (it is for "
            f"{', '.join(PACKABLE)}): use --packing False."
        )
    on_gpu = device.type == "cuda" and half_precision
    if requested is None:
        if not packing:
            return None
        if not on_gpu:
            return "eager" if model_type in CAPPED else "sdpa"
        if model_type in CAPPED and not is_flash_attn_2_available():
            raise UserError(
                f"To pack samples for models of type {model_type!r} on a GPU needs the package flash-attn: torch's "
                f"kernels cannot cap attention scores, and eager attention would hold those of a whole row. Install it "
                f"or use --packing False."
            )
        return "flash_attention_2" if is_flash_attn_2_available() else "varlen"
    if requested in ("sdpa", "varlen") and model_type in CAPPED:
        raise UserError(
            f"--attn_implementation {requested} cannot cap attention scores as models of type {model_type!r} do: use "
            f"eager or flash_attention_2."
        )
    check_flash_attention(requested, is_flash_attn_2_available())
    if requested in ("flash_attention_2", "varlen") and not on_gpu:
        raise UserError(f"--attn_implementation {requested} needs a GPU and --bf16 True or --fp16 True.")
    if requested == "varlen" and not packing:
        raise UserError("--attn_implementation varlen is for packed batches: use --packing True or sdpa.")
    return requested
