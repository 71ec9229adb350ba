"""Tells DeepSpeed that there is no GPU, which it otherwise looks for, to print that it found none.

Imported by `data` and `tools`, of which one comes first in every program, before transformers or accelerate import
DeepSpeed. Not by `mini_llava` itself: torch takes two seconds to import, and train.py watches for signals before.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
