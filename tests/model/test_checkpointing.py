"""Recomputing a share of the layers saves memory and changes nothing else."""

import pytest
import torch

from tests.training.tiny_llava import micro_batch, tiny_llava


def gradients_and_runs(share: float | None) -> tuple[list[torch.Tensor], list[int]]:
    """The gradients of one micro-batch, and how often each of the four layers ran for them."""
    model, runs = tiny_llava(), [0] * 4
    for number, layer in enumerate(model.language_model.model.layers):

        def count(*_, number=number):
            runs[number] += 1

        layer.mlp.register_forward_pre_hook(count)  # recomputing stops before the end
    if share is not None:
        model.gradient_checkpointing_enable(share)
    torch.manual_seed(1)
    model(**micro_batch([30, 12], images=1)).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.requires_grad], runs


@pytest.mark.parametrize(
    ("share", "expected"), [(0.25, [1, 1, 1, 2]), (0.5, [1, 2, 1, 2]), (0.75, [1, 2, 2, 2]), (1.0, [2, 2, 2, 2])]
)
def test_the_share_of_layers_is_recomputed_evenly_and_no_gradient_changes(share, expected):
    kept, runs = gradients_and_runs(None)
    assert runs == [1, 1, 1, 1]
    recomputed, runs = gradients_and_runs(share)
    assert runs == expected
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))
