"""A hand-written trainer for LLaVA-1.5 style vision-language models on accelerate and DeepSpeed."""

__version__ = "0.1.0"
