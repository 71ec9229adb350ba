"""What the server of forked_runs.py imports once for all runs, with what else they would all begin with."""

import functools
import gc
import os

# One thread: OpenMP's threads do not survive a fork, and continuous integration has few cores.
os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import accelerate.utils.deepspeed  # noqa: F401
import bitsandbytes  # noqa: F401
import deepspeed.ops
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer  # two CPU seconds, of which torch's compiler is most
import deepspeed.utils.numa
import peft  # noqa: F401
import torch.distributed.run  # noqa: F401
import transformers.models.clip.modeling_clip
import transformers.models.llama.modeling_llama
import transformers.models.llava.configuration_llava  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import train  # noqa: F401
from mini_llava.arguments import PARTS
from mini_llava.command_line import field_texts
from mini_llava.watch import summary
from tests.packages_read_once import read_packages_once
from tests.undrawn import write_undrawn

read_packages_once()
# Asked of a program, `numactl`, for each gradient that ZeRO-3 divides: a hundred starts in a tiny run.
deepspeed.utils.numa.get_numa_cores = functools.cache(deepspeed.utils.numa.get_numa_cores)
# Asked of compilers and GPUs by the first access. train.py says the same; the Trainer of a benchmark would compile it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
get_checkpoint_conversion_mapping("llama")  # a table that every first loading makes
for part in PARTS:
    field_texts(part)  # read from the source by every first parser
summary.draw_curves = write_undrawn
gc.freeze()  # collections in a fork need not look through all this, which would also copy it
