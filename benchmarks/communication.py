"""How much ZeRO-3 sends: the bytes of all collectives of a step of `train.py`, counted, on CPUs (on GPUs not tried).

    python benchmarks/random_setup.py --directory /tmp/bench16 --shape tiny --layers 16 --records 64
    accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 2 benchmarks/communication.py \
        --setup /tmp/bench16 --whole_up_to 10000 --stage 2 --bf16 True --gradient_checkpointing False \
        --global_batch_size 6 --per_device_train_batch_size 1

Weights are gathered once a step where all of them may be whole at a time, and in each micro-batch otherwise
(`--live_up_to 5000000`).

Every other flag is `train.py`'s. How often a weight is gathered depends on DeepSpeed's limits and not on its size, so a
small model whose weights are divided all the same says it of a large one. The third of four steps counts.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import deepspeed.comm  # noqa: E402
from deepspeed.comm.comm import comms_logger  # noqa: E402

from benchmarks import throughput  # noqa: E402
from benchmarks.steps import before_each_step  # noqa: E402
from benchmarks.without import set_zero  # noqa: E402
from mini_llava.training import backend  # noqa: E402


def sent_so_far() -> Counter:
    """The bytes of all messages by the name of the collective, all ranks' parts together: DeepSpeed's own log."""
    _, processes = backend.launched_rank()
    sent = Counter()
    for name, sizes in comms_logger.get_raw_data().items():
        parts = processes if name == "all_gather_into_tensor" else 1  # the log has the size of one
        sent[name] = parts * sum(size * count for size, (count, *_) in sizes.items())
    return sent


def count_bytes(steps: list[dict], whole_up_to: int) -> None:
    """Have every step of the trainer but the last append what it sent, its micro-batches, the bytes of its weights.

    whole_up_to: the parameters of a weight that is not divided, at most.
    """
    before = Counter()

    def act(model, micro_batches: int) -> None:
        sizes = [(parameter.ds_numel * parameter.element_size(), parameter) for parameter in model.parameters()]
        divided = sum(size for size, parameter in sizes if parameter.ds_numel > whole_up_to)
        weights, sent = sum(size for size, _ in sizes), sent_so_far() - before
        steps.append(dict(sent=sent, micro_batches=micro_batches, weights=weights, divided=divided))
        before.update(sent)

    deepspeed.comm.configure(enabled=True, prof_all=True)
    before_each_step(act)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--setup", type=Path, required=True, help="what random_setup.py wrote")
    parser.add_argument(
        "--whole_up_to", type=int, help="divide weights of more parameters than these [train.py's limit]"
    )
    parser.add_argument("--live_up_to", type=int, help="DeepSpeed's stage3_max_live_parameters [train.py's limit]")
    own, flags_of_train = parser.parse_known_args()
    zero = {"stage": 3}
    if own.whole_up_to is not None:
        zero["stage3_param_persistence_threshold"] = own.whole_up_to
    if own.live_up_to is not None:
        zero["stage3_max_live_parameters"] = own.live_up_to
    set_zero(zero)
    backend.complete_zero(zero, None)
    own.steps, own.output_dir, own.profile = 4, None, None
    steps = []
    count_bytes(steps, zero["stage3_param_persistence_threshold"])
    throughput.run(own, flags_of_train)
    rank, processes = backend.launched_rank()
    if rank == 0:
        last = steps[-1]
        if not last["divided"]:
            sys.exit("communication.py: error: no weight is divided here: give --whole_up_to a lower number.")
        print(f"\nWeights: {last['weights'] / 1e6:,.0f} MB, of them divided {last['divided'] / 1e6:,.0f} MB.\n")
        print(f"| a step of {last['micro_batches']} micro-batches | MB | times the divided weights, a micro-batch |")
        print("|---|---|---|")
        for name, size in sorted(last["sent"].items()):
            print(f"| {name} | {size / 1e6:,.1f} | {size / last['divided'] / last['micro_batches']:.2f} |")
        print(f"\n{processes} processes; commit {throughput.commit()}; {backend.versions()}")


if __name__ == "__main__":
    main()
