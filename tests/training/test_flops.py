"""The arithmetic that MFU counts is the arithmetic that PyTorch does, less what a step could do without."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from mini_llava.watch.flops import FlopCounter
from tests.training.tiny_llava import TOKENS_PER_IMAGE, micro_batch, tiny_llava

WIDTH, LAYERS = 32, 4


def done_by_pytorch(model, batch) -> float:
    with FlopCounterMode(display=False) as counter:
        model(**batch).backward()
    # Some versions of transformers make the angles of rotary embeddings by a product of matrices, others by columns.
    angles = [counts for name, counts in counter.get_flop_counts().items() if name.endswith(".rotary_emb")]
    return counter.get_total_flops() - sum(sum(counts.values()) for counts in angles)


def masked_attention(length: int) -> int:
    """Half of the language model's attention, forward and backward: eager attention computes what the mask hides."""
    return 3 * 2 * length**2 * WIDTH * LAYERS


@pytest.mark.parametrize("trained", [("projector", "language_model"), ("projector",), ("language_model",)])
def test_one_sample_with_an_image(trained):
    model, batch = tiny_llava(trained), micro_batch([40], images=1)
    counted = FlopCounter(model)(batch)
    if "projector" in trained:  # 6 for each trained weight, but no gradient goes on to the frozen tower
        counted -= 2 * TOKENS_PER_IMAGE * model.projector[0].weight.numel()
    assert counted == done_by_pytorch(model, batch) - masked_attention(40)


def test_text_alone_counts_no_image_although_a_blank_one_is_sent_through():
    model, batch = tiny_llava(("language_model",)), micro_batch([40])
    assert FlopCounter(model)(batch) == FlopCounter(tiny_llava())(batch)
    blank = FlopCounter(model).per_image
    assert FlopCounter(model)(batch) == done_by_pytorch(model, batch) - masked_attention(40) - blank


def test_padding_counts_nothing_and_packed_samples_do_not_attend_to_each_other():
    count = FlopCounter(tiny_llava())
    alone = [count(micro_batch([length])) for length in (40, 12)]
    assert count(micro_batch([40, 12], packed=False)) == pytest.approx(sum(alone), rel=1e-12)
    assert count(micro_batch([40, 12])) == pytest.approx(sum(alone), rel=1e-12)


def test_a_trained_tower_costs_three_times_a_frozen_one():
    frozen, trained = (
        FlopCounter(tiny_llava()),
        FlopCounter(tiny_llava(("vision_tower", "projector", "language_model"))),
    )
    projector = 6 * TOKENS_PER_IMAGE * sum(w.numel() for w in tiny_llava().projector.parameters() if w.dim() > 1)
    assert trained.per_image - projector == 3 * (frozen.per_image - projector)


def test_of_a_7b_model_the_usual_approximation_is_close():
    """6 N tokens counts the table of embeddings and the head for every token, and leaves attention and tower out."""
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        model = tiny_llava()
        model.language_model = LlamaForCausalLM(config)
    counter = FlopCounter(model)
    assert counter.language_model_parameters == 6_738_415_616
    assert counter(micro_batch([830])) == pytest.approx(6 * counter.language_model_parameters * 830, rel=0.04)
