#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU with AVX512-BF16: after one forward in eval mode a 4-bit layer trains on wrong gradients.
#
# The first forward of `Linear4bit` in eval mode without gradients packs the weights anew for a fast kernel. `train()`
# does not undo it. No gradient passes the layer any more, so that whatever lies below it is no longer trained: QLoRA that
# is evaluated once goes on with a part of its gradients, after nothing but a warning of torch's at the first backward.
#
# Seen with torch 2.11.0 on such a CPU (64 x 64, nf4; the layer and its input are the same each time):
#   norm of the gradient before eval mode 15.520, after it None
#
# On a CPU without AVX512-BF16 (before Cooper Lake, Sapphire Rapids and Zen 4) the layer is not packed, and this script
# only says so. Elsewhere it fails when the behaviour changes.
set -euo pipefail
if ! grep -q avx512_bf16 /proc/cpuinfo; then
    echo "This CPU has no AVX512-BF16: nothing to see here."
    exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 bitsandbytes==0.50.2
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from bitsandbytes.nn import Linear4bit

torch.manual_seed(0)
layer = Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
values = torch.randn(4, 64)


def gradient() -> torch.Tensor | None:
    inputs = values.clone().requires_grad_()
    output = layer(inputs)
    if output.requires_grad:
        output.square().sum().backward()
    return inputs.grad


before = gradient()
layer.eval()
with torch.no_grad():
    layer(values)
layer.train()
after = gradient()
norm = None if after is None else round(float(after.norm()), 3)
print(f"norm of the gradient before eval mode {float(before.norm()):.3f}, after it {norm}")
assert after is None or not torch.allclose(before, after, rtol=1e-2), "the gradient is the same after eval mode"
PYTHON
