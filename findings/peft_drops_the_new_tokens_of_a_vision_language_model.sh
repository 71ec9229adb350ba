#!/usr/bin/env bash
# peft 0.21.2 saves resized embeddings with the adapter of a language model, but not with that of a vision-language model,
# silently.
#
# `save_pretrained` has `save_embedding_layers="auto"`: embeddings that were resized for new tokens are saved with the
# adapter, since the base model on disk does not have the new rows. To notice them, peft compares `config.vocab_size` with
# the base model's. The configs of vision-language models (LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2.5-VL, Gemma 3) have it
# one level deeper, in `text_config`: peft finds None and takes the vocabulary for unchanged. Nothing is said when saving or
# loading. The loaded model has, for the new tokens, the rows that its own `resize_token_embeddings` drew at random.
# `save_embedding_layers=True` saves them.
#
# Seen with transformers 5.23.0 (random models, two new tokens whose rows are copies of other tokens' rows; the difference
# depends on the weights, its being there does not):
#   Llama, auto: saved with the adapter ['lm_head', 'embed_tokens'], largest difference of logits after loading 0e+00
#   Llava, auto: saved with the adapter [], largest difference of logits after loading 1e+00
#   Llava, True: saved with the adapter ['lm_head', 'embed_tokens'], largest difference of logits after loading 0e+00
#
# Fails when the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1)
text = LlamaConfig(vocab_size=32, **sizes)
vision = CLIPVisionConfig(image_size=28, patch_size=14, **sizes)
llava = LlavaConfig(text_config=text, vision_config=vision, image_token_index=4, image_seq_length=4)


def resized(kind: type, base: Path) -> torch.nn.Module:
    model = kind.from_pretrained(base)
    model.resize_token_embeddings(34)
    return model.eval()


def lost(name: str, kind: type, config: LlamaConfig | LlavaConfig, save_embedding_layers: bool | str) -> bool:
    base, adapter = (Path(sys.argv[1]) / f"{name}-{save_embedding_layers}-{part}" for part in ("base", "adapter"))
    kind(config).save_pretrained(base)
    model = resized(kind, base)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight.data[32:] = layer.weight.data[10:12]
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(adapter, save_embedding_layers=save_embedding_layers)
    loaded = PeftModel.from_pretrained(resized(kind, base), adapter)
    ids = torch.tensor([[5, 32, 6, 33]])
    with torch.no_grad():
        difference = float((model(input_ids=ids).logits - loaded(input_ids=ids).logits).abs().max())
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        saved = [key.split(".")[-2] for key in file.keys() if "lora" not in key]
    print(f"{name}, {save_embedding_layers}: saved with the adapter {saved}, ", end="")
    print(f"largest difference of logits after loading {difference:.0e}")
    return not saved and difference > 1e-2


assert not lost("Llama", LlamaForCausalLM, text, "auto"), "the adapter of a language model loses them too"
assert lost("Llava", LlavaForConditionalGeneration, llava, "auto"), "the new tokens of LLaVA are saved now"
assert not lost("Llava", LlavaForConditionalGeneration, llava, True), "they are lost whatever is asked for"
PYTHON
