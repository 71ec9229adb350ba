"""How much ZeRO-3 sends: the bytes of all collectives of a step of `train.py`, counted, on CPUs (on GPUs not tried).

    python benchmarks/random_setup.py --directory /tmp/bench16 --shape tiny --layers 16 --records 64
    accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 2 benchmarks/communication.py \
        --setup /tmp/bench16 --whole_up_to 10000 --stage 2 --bf16 True --gradient_checkpointing False \
        --global_batch_size 6 --per_device_train_batch_size 1

Every other flag is `train.py`'s. How often a weight is gathered depends on DeepSpeed's limits and not on its size, so a
small model whose weights are divided all the same says it of a large one. The last of three steps counts.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from deepspeed.comm.torch import TorchBackend  # noqa: E402

from benchmarks import throughput  # noqa: E402
from mini_llava.training import backend  # noqa: E402

COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce")  # that DeepSpeed calls in a step


def counted(name: str, sent: Counter) -> Callable:
    """The collective, adding the bytes of its message to `sent`, by its name and dtype."""
    collective = getattr(TorchBackend, name)

    def call(*arguments, **others):
        tensors = [value for value in (*arguments, *others.values()) if torch.is_tensor(value)]
        message = max(tensors, key=lambda tensor: tensor.nbytes)  # all ranks' parts; the other tensor is one of them
        sent[f"{name}, {str(message.dtype).removeprefix('torch.')}"] += message.nbytes
        return collective(*arguments, **others)

    return call


def count_bytes(steps: list[dict]) -> None:
    """Makes every step of the trainer append what it sent, its micro-batches, and the bytes of its weights."""
    sent = Counter()
    for name in COLLECTIVES:
        setattr(TorchBackend, name, counted(name, sent))

    def end(model, micro_batches: int) -> None:
        sizes = [
            (parameter.ds_numel * parameter.element_size(), parameter.ds_persist) for parameter in model.parameters()
        ]
        divided = sum(size for size, whole in sizes if not whole)
        weights = sum(size for size, _ in sizes)
        steps.append(dict(sent=Counter(sent), micro_batches=micro_batches, weights=weights, divided=divided))

    throughput.around_steps(sent.clear, end)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--setup", type=Path, required=True, help="what random_setup.py wrote")
    parser.add_argument(
        "--whole_up_to", type=int, help="divide weights of more parameters than these [train.py's limit]"
    )
    own, flags_of_train = parser.parse_known_args()
    if own.whole_up_to is not None:
        complete = backend.complete_zero
        limit = {"stage3_param_persistence_threshold": own.whole_up_to}
        backend.complete_zero = lambda zero, memory: zero.update(limit) or complete(zero, memory)
    own.steps, own.output_dir, own.profile = 3, None, None
    steps = []
    count_bytes(steps)
    throughput.run(own, flags_of_train)
    rank, processes = backend.launched_rank()
    if rank == 0:
        last = steps[-1]
        print(f"\nWeights: {last['weights'] / 1e6:,.0f} MB, of them divided {last['divided'] / 1e6:,.0f} MB.\n")
        print(f"| a step of {last['micro_batches']} micro-batches | MB | times the divided weights, a micro-batch |")
        print("|---|---|---|")
        for name, size in sorted(last["sent"].items()):
            print(f"| {name} | {size / 1e6:,.1f} | {size / last['divided'] / last['micro_batches']:.2f} |")
        print(f"\n{processes} processes; commit {throughput.commit()}; {backend.versions()}")


if __name__ == "__main__":
    main()
