"""A loss of one's own: what README's diff adds, and that it stays the same however a batch is laid out."""

import importlib.util
import re
import shutil
import subprocess

import pytest
import torch

from mini_llava.model.llava import LlavaModel
from tests.end_to_end import runs
from tests.launching import ROOT
from tests.readme import PAGES


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """`mini_llava/model/llava.py` with the diff that README shows."""
    [diff] = re.findall(r"^```diff\n([^`]*z-loss[^`]*)^```$", PAGES, re.M)
    assert len(diff.splitlines()) <= 10
    folder = tmp_path_factory.mktemp("patched")
    (folder / "mini_llava" / "model").mkdir(parents=True)
    file = shutil.copy(ROOT / "mini_llava" / "model" / "llava.py", folder / "mini_llava" / "model")
    subprocess.run(["git", "apply", "--verbose", "-"], input=diff, text=True, cwd=folder, check=True)
    specification = importlib.util.spec_from_file_location("mini_llava.model.patched_llava", file)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.LlavaModel


def losses_of(folder, **values) -> torch.Tensor:
    """Of two steps, the second with weights that the first has changed."""
    common = dict(max_steps=2, global_batch_size=4, save_strategy="no", warmup_ratio=0, learning_rate=1e-3)
    runs.train_here(runs.flags_of(2, folder, common | values))
    return torch.tensor([entry["loss"] for entry in runs.log(folder)])


def test_readmes_diff_adds_its_loss_for_each_trained_token_packed_or_padded(patched, tmp_path, monkeypatch):
    seen = []

    def as_before(self, *, targets, **given):
        hook = self.language_model.register_forward_hook(lambda _module, _given, made: seen.append((made, targets)))
        try:
            return forward(self, targets=targets, **given)
        finally:
            hook.remove()

    forward = LlavaModel.forward
    with monkeypatch.context() as patch:
        patch.setattr(LlavaModel, "forward", as_before)
        without = losses_of(tmp_path / "without", packing=True, longest_batch_first=False)
    monkeypatch.setattr(LlavaModel, "forward", patched.forward)
    packed, padded = (losses_of(tmp_path / str(packing), packing=packing) for packing in (True, False))
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=0)  # sums in another order

    made, targets = seen[0]
    sizes = made.logits.double().exp().sum(-1).log()[targets != -100]
    torch.testing.assert_close(packed[0] - without[0], 1e-4 * sizes.square().mean().float(), rtol=0, atol=2e-6)
    assert packed[1] != without[1]
