"""Run by test_formats.py in two processes: saves a model partitioned by ZeRO-3 in every layout."""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from mini_llava.formats.write import save_llava, save_projector_only, save_transformers
from tests.model.test_formats import build, described, tied_language_model

ZERO3 = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    for name, language_model in (("llama", None), ("qwen", tied_language_model())):
        model = build(language_model=language_model)
        optimizer = torch.optim.AdamW(model.parameters())
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO3)
        model = engine.module
        assert all(parameter.numel() == 0 for parameter in model.parameters()), "nothing is partitioned"
        save_transformers(directory / name / "transformers", model, described(), shard_bytes=60_000)
        save_llava(directory / name / "llava", model, described(include_vision_tower=True))
        save_projector_only(directory / name / "projector", model, described())
        assert all(parameter.numel() == 0 for parameter in model.parameters()), "a parameter was left whole"
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
