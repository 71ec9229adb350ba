"""A packed row computes what its samples compute alone, in every family of language models that may be packed."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel
from transformers.utils import is_flash_attn_2_available

from mini_llava.data.collator import collate
from mini_llava.data.images import Picture
from mini_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Sample
from mini_llava.model.llava import LlavaModel
from mini_llava.model.projector import build_projector
from mini_llava.model.vision_tower import VisionTower
from mini_llava.options.attention import CAPPED, PACKABLE, choose_attention

VOCABULARY = 100
IMAGE_SIZE = 28
# Large weights, so that attention is far from uniform and what one token sees of another matters.
SIZE = dict(
    **dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    **dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=128, initializer_range=0.2),
    **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2),
)
# Windows shorter than the samples: the mask then has to respect both the window and the bounds of the samples.
WINDOWS = {
    "mistral": dict(sliding_window=4),
    "qwen2": dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "gemma2": dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "gemma3_text": dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    "phi3": dict(sliding_window=4),
}
CASES = [(family, {}) for family in PACKABLE] + list(WINDOWS.items())
NAMES = list(PACKABLE) + [f"{family} with a window" for family in WINDOWS]
# They have no positions, and can be padded only.
WITHOUT_POSITIONS = [
    ("mpt", dict(d_model=32, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=128)),
    ("mamba", {}),
]

# fp32 sums in another order; the logits go up to 5. Seeing another sample changes them by more than 0.1.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


def build(family: str, changes: dict, attention: str | None) -> LlavaModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZE, **changes)
    language_model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    vision = CLIPVisionConfig(
        **dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
        **dict(image_size=IMAGE_SIZE, patch_size=14),
    )
    tower = VisionTower(CLIPVisionModel(vision))
    return LlavaModel(tower, build_projector("linear", 16, 32), language_model).eval()


def samples_with_images() -> list[Sample]:
    """Text only, one image, one token to predict, two images; every token that is not an image is trained."""
    generator = np.random.default_rng(0)
    text = lambda length: generator.integers(3, VOCABULARY, length)  # noqa: E731
    image = np.full((IMAGE_SIZE // 14) ** 2, IMAGE_TOKEN_INDEX)
    rows = [
        text(17),
        np.concatenate([text(3), image, text(9)]),
        text(2),
        np.concatenate([text(1), image, text(5), image, text(4)]),
    ]
    pixels = torch.randn(3, 1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    pictures = dict(zip("abc", (Picture(each, len(image)) for each in pixels), strict=True))
    samples = []
    for row, names in zip(rows, ([], ["a"], [], ["b", "c"]), strict=True):
        labels = np.where(row == IMAGE_TOKEN_INDEX, IGNORE_INDEX, row)
        opened = [pictures[name] for name in names]
        samples.append(Sample(row.astype(np.int32), labels.astype(np.int32), names, opened))
    return samples


@torch.no_grad()
def logits_and_loss(model: LlavaModel, samples, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [trained tokens, vocabulary], as the language model gives them inside the model's own forward."""
    seen = []
    hook = model.language_model.register_forward_hook(lambda *call: seen.append(call[-1].logits))
    batch = collate(samples, IMAGE_SIZE, packed)
    loss = model(**batch)
    hook.remove()
    return seen[0][batch["targets"] != IGNORE_INDEX], loss


def one_by_one(model: LlavaModel) -> tuple[torch.Tensor, torch.Tensor]:
    results = [logits_and_loss(model, [sample], packed=False) for sample in samples_with_images()]
    return torch.cat([logits for logits, _ in results]), torch.stack([loss for _, loss in results]).sum()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "changes"), CASES, ids=NAMES)
def test_packed_logits_equal_those_of_each_sample_alone(family, changes, attention):
    device = torch.device("cpu")
    if attention == "sdpa" and family in CAPPED:
        with pytest.raises(ValueError, match=r"sdpa cannot cap attention scores .* 'gemma2' do: use eager"):
            choose_attention(attention, family, packing=True, device=device, half_precision=False)
        attention = None
    attention = choose_attention(attention, family, packing=True, device=device, half_precision=False)
    model = build(family, changes, attention)
    assert model.language_model.config.use_cache, "the default that would make packed samples see each other"

    packed, packed_loss = logits_and_loss(model, samples_with_images(), packed=True)
    alone, loss = one_by_one(model)
    assert len(alone) > 30 and alone.std() > 0.5
    torch.testing.assert_close(packed, alone, **TOLERANCE)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("family", "changes"), CASES + WITHOUT_POSITIONS, ids=[*NAMES, "mpt", "mamba"])
def test_padded_logits_equal_those_of_each_sample_alone(family, changes):
    model = build(family, changes, None)
    padded, _ = logits_and_loss(model, samples_with_images(), packed=False)
    alone, _ = one_by_one(model)
    torch.testing.assert_close(padded, alone, **TOLERANCE)


def test_families_that_ignore_the_bounds_of_samples_are_refused():
    with pytest.raises(ValueError, match=r"models of type 'opt' .*use --packing False"):
        choose_attention(None, "opt", packing=True, device=torch.device("cpu"), half_precision=False)
    assert choose_attention(None, "opt", packing=False, device=torch.device("cpu"), half_precision=False) is None


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn, which can cap attention scores, is installed")
def test_gemma_2_is_packed_on_a_gpu_only_by_a_kernel_that_caps_scores():
    gpu = dict(model_type="gemma2", device=torch.device("cuda"), half_precision=True)
    with pytest.raises(ValueError, match=r"type 'gemma2' on a GPU needs the package flash-attn.*--packing False"):
        choose_attention(None, packing=True, **gpu)
    assert choose_attention(None, packing=False, **gpu) is None
    assert choose_attention("eager", packing=True, **gpu) == "eager"


def test_opt_does_ignore_them_and_is_right_when_padded():
    """What the refusal spares, and that the comparison above would notice it."""
    model = build("opt", dict(ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, init_std=0.2), "sdpa")
    alone, _ = one_by_one(model)
    packed, _ = logits_and_loss(model, samples_with_images(), packed=True)
    padded, _ = logits_and_loss(model, samples_with_images(), packed=False)
    assert (packed - alone).abs().max() > 0.1
    torch.testing.assert_close(padded, alone, **TOLERANCE)
