#!/usr/bin/env bash
# transformers 5.23.0: a packed row is kept apart by restarting positions only if use_cache=False is passed; with the
# default its samples see each other, silently.
#
# Two sequences concatenated into one row, position_ids that restart, no attention mask: transformers then builds a
# block-diagonal mask, and the logits equal those of the sequences alone. The default of `forward` is to make a cache,
# and with one the row is taken for one long sequence: no warning, and every logit of the second sequence is another.
# In training nothing turns the cache off unless gradient checkpointing is on.
#
# Seen (random Llama of two layers, fp32; the difference depends on the weights, its being there does not):
#   use_cache=False: largest difference 5e-07
#   default:         largest difference 2e+00
#
# This script fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.1)).eval()
first, second = torch.randint(64, (1, 7)), torch.randint(64, (1, 9))
packed = torch.cat([first, second], dim=1)
positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
with torch.no_grad():
    alone = model(second).logits
    apart = model(packed, position_ids=positions, use_cache=False).logits[:, 7:]
    default = model(packed, position_ids=positions).logits[:, 7:]
differences = [float((logits - alone).abs().max()) for logits in (apart, default)]
print("use_cache=False: largest difference {:.0e}\ndefault:         largest difference {:.0e}".format(*differences))
assert differences[0] < 1e-5, "packed samples are no longer kept apart without the cache"
assert differences[1] > 1e-3, "packed samples are kept apart with the cache too"
PYTHON
