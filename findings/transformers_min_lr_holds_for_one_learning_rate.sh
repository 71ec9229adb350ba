#!/usr/bin/env bash
# transformers 5.23.0: with `cosine_with_min_lr`, `min_lr` is the lowest learning rate only of the parameter groups that
# have the optimizer's default learning rate; others end elsewhere, silently.
#
# LLaVA trains the projector, the vision tower and the language model with learning rates of their own. The scheduler divides
# `min_lr` by `optimizer.defaults["lr"]`, and each group ends at this share of its own learning rate: far above `min_lr`
# or below it. If every group names its learning rate and the optimizer is given none, torch's default of 1e-3 is the
# divisor.
#
# Seen with torch 2.13.0, min_lr 2e-6, groups of 2e-5 (language model), 2e-6 (vision tower) and 1e-3 (projector), the
# learning rates after the last step:
#   AdamW(groups, lr=2e-5): 2e-06, 2e-07, 1e-04
#   AdamW(groups): 4e-08, 4e-09, 2e-06
#
# Fails when the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import get_scheduler

seen = {}
for name, given in {"AdamW(groups, lr=2e-5)": {"lr": 2e-5}, "AdamW(groups)": {}}.items():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (2e-5, 2e-6, 1e-3)]
    optimizer = torch.optim.AdamW(groups, **given)
    settings = dict(num_warmup_steps=0, num_training_steps=10, scheduler_specific_kwargs={"min_lr": 2e-6})
    scheduler = get_scheduler("cosine_with_min_lr", optimizer, **settings)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    seen[name] = ", ".join(f"{lr:.0e}" for lr in scheduler.get_last_lr())
    print(f"{name}: {seen[name]}")
assert list(seen.values()) == ["2e-06, 2e-07, 1e-04", "4e-08, 4e-09, 2e-06"]
PYTHON
