"""Run by test_not_finite_steps.py on each backend: losses that are not finite, and what becomes of the weights."""

import json
import math
import sys
from pathlib import Path

import torch

from mini_llava.training import backend


class Embedded(torch.nn.Module):
    """Its loss is 1 of a weight times `factor`, plus `offset`, which has no gradient."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))

    def forward(self, factor: float, offset: float) -> torch.Tensor:
        return self.weight.sum() * factor + offset


def main(output: Path) -> None:
    torch.set_num_threads(1)
    accelerator = backend.build_accelerator("no", 0.0, "none", output)
    model = Embedded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    model, optimizer = accelerator.prepare(model, optimizer)
    last = accelerator.process_index == accelerator.num_processes - 1
    found = {}
    for name, factor, offset in (
        ("finite", 1.0, 0.0),
        ("gradient nan", math.nan, 0.0),
        ("gradient inf", math.inf, 0.0),
        ("loss inf, gradient finite", 1.0, math.inf),
        ("loss nan, gradient zero", 0.0, math.nan),
        ("finite again", 1.0, 0.0),
    ):
        # Two micro-batches, and only the last rank's first one is not finite.
        values = [(factor, offset) if last else (1.0, 0.0), (1.0, 0.0)]
        for number, value in enumerate(values):
            with backend.micro_step(accelerator, model, is_last=number == 1):
                backend.backward(accelerator, model(*value))
        _, finite = backend.optimizer_step(accelerator, optimizer, 0.0)
        [parameter] = accelerator.unwrap_model(model).parameters()
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                weight = parameter.tolist()
        else:
            weight = parameter.tolist()
        found[name] = {"finite": finite, "weight": weight}
    (output / f"rank{accelerator.process_index}.json").write_text(json.dumps(found))
    print(backend.describe(accelerator))
    backend.end_training(accelerator, model)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
