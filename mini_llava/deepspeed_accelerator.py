"""Tells DeepSpeed that there is no GPU, which it otherwise looks for, to print that it found none.

Imported by `model`, which every program imports that loads a model, before transformers or accelerate import DeepSpeed.
Not by `mini_llava` itself: torch takes two seconds to import, and what is wrong with the flags is said before.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
