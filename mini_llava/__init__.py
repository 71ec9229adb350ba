"""A hand-written trainer for LLaVA-1.5 style vision-language models on accelerate and DeepSpeed."""

import os

import torch

if not torch.cuda.is_available():
    # Before transformers or accelerate import DeepSpeed, which otherwise looks for a GPU and prints that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

__version__ = "0.1.0"
