#!/usr/bin/env bash
# DeepSpeed 0.19.8: after `zero.Init`, linear layers of the whole process round differently, those outside of it too.
#
# `deepspeed.zero.Init` replaces `torch.nn.functional.linear` by a function that keeps less for backward, and does not put
# the old one back. A model that was loaded before, and that nothing partitions (a teacher, a reference, a frozen vision
# tower), computes with it from then on. In half precision it rounds the product and then adds the bias, where torch
# rounds once, so that hidden states [batch, length, width] come out different. The same numbers as rows [n, width] do not:
# for matrices the bias is added as torch does. `memory_efficient_linear: false` in the config leaves torch's function.
#
# Seen with torch 2.13.0 on a CPU, a layer of bf16 that was made before:
#   before zero.Init: 0 of 32,768 outputs differ
#   after zero.Init: 9,637 differ as [2, 256, 64], 0 as [512, 64]
#
# This script fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 deepspeed==0.19.8 setuptools
cat > "$folder/seen.py" <<'PYTHON'
import os

import torch
from torch import nn

os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed  # noqa: E402

torch.manual_seed(0)
layer = nn.Linear(64, 64, dtype=torch.bfloat16)
x = torch.randn(2, 256, 64, dtype=torch.bfloat16)
torchs = layer(x)


def differ(output: torch.Tensor) -> int:
    return int((output.view_as(torchs) != torchs).sum())


print(f"before zero.Init: {differ(layer(x))} of {torchs.numel():,} outputs differ")
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for more than a minute
deepspeed.init_distributed("gloo", verbose=False)
with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 1, "zero_optimization": {"stage": 3}}):
    pass
batched, rows = differ(layer(x)), differ(layer(x.flatten(0, 1)))
print(f"after zero.Init: {batched:,} differ as {list(x.shape)}, {rows} as {list(x.flatten(0, 1).shape)}")
assert batched > 1000 and rows == 0, "all outputs are torch's now"
PYTHON
"$folder/venv/bin/python" "$folder/seen.py"
