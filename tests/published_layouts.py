"""Directories laid out like the published LLaVA-1.5 7B, in both layouts: the real files, keys and names, tiny sizes.

The weights are those of `parity/fixtures/llava_init`, which the original LLaVA made, in fp16 as published.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "parity" / "fixtures"
CLIP = FIXTURES / "clip"
ROWS, IMAGE_ID, PAD_ID = 832, 800, 801  # 64-padded; llava-hf has 32064, 32000 and 32001


def llava_weights() -> dict[str, torch.Tensor]:
    """By the names of LLaVA's own code, vision tower included."""
    return load_file(FIXTURES / "llava_init" / "model.safetensors")


def language_model_and_projector() -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in llava_weights().items() if "vision_tower" not in name}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2))


def edit_json(path: Path, **changes) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def write_shards(folder: Path, weights: dict, kind: str) -> None:
    """Two files and their index; `kind` is bin or safetensors."""
    stem = {"bin": "pytorch_model", "safetensors": "model"}[kind]
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"{stem}-{number:05d}-of-00002.{kind}"
        content = {name: weights[name].contiguous() for name in part}
        if kind == "bin":
            torch.save(content, folder / file)
        else:
            save_file(content, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    write_json(folder / f"{stem}.{kind}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def like_liuhaotian(folder: Path, kind: str = "bin", with_tower: bool = False) -> Path:
    """`liuhaotian/llava-v1.5-7b`: the tower by name, unless `with_tower`, as LLaVA's trainer saves it."""
    folder.mkdir(parents=True)
    weights = llava_weights() if with_tower else language_model_and_projector()
    # Older transformers saved these buffers with the weights.
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    write_shards(folder, weights, kind)
    projector = {name: tensor for name, tensor in weights.items() if "mm_projector" in name}
    torch.save(projector, folder / "mm_projector.bin")
    config = {
        **{"_name_or_path": "llava-v1.5-7b", "architectures": ["LlavaLlamaForCausalLM"], "bos_token_id": 1},
        **{"eos_token_id": 2, "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False},
        **{"hidden_act": "silu", "hidden_size": 64, "image_aspect_ratio": "pad", "initializer_range": 0.02},
        **{"intermediate_size": 128, "max_length": 4096, "max_position_embeddings": 4096, "mm_hidden_size": 32},
        **{"mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None, "mm_use_im_patch_token": False},
        **{"mm_use_im_start_end": False, "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2},
        **{"mm_vision_tower": str(CLIP), "model_type": "llava", "num_attention_heads": 4, "num_hidden_layers": 2},
        **{"num_key_value_heads": 4, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05},
        **{"rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16"},
        **{"transformers_version": "4.31.0", "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False},
        **{"unfreeze_mm_vision_tower": False, "use_cache": True, "use_mm_proj": True, "vocab_size": 800},
    }
    write_json(folder / "config.json", config)
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "max_length": 4096}
    write_json(folder / "generation_config.json", generation | {"pad_token_id": 0, "transformers_version": "4.31.0"})
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(FIXTURES / "llm" / file, folder / file)
    return folder


def like_llava_hf(folder: Path, names: str = "transformers 4") -> Path:
    """`llava-hf/llava-1.5-7b-hf`; `names` transformers 5 gives those that it has in memory."""
    folder.mkdir(parents=True)
    layers = {"0": "linear_1", "2": "linear_2"}
    weights = {}
    for name, tensor in llava_weights().items():
        if "mm_projector" in name:
            number, kind = name.split(".")[-2:]
            name = f"multi_modal_projector.{layers[number]}.{kind}"
        elif "vision_tower" in name:
            name = "vision_tower." + name.removeprefix("model.vision_tower.vision_tower.")
        else:
            name = f"language_model.{name}"
            if len(tensor) == 800:
                tensor = torch.cat([tensor, tensor.float().mean(dim=0).half().expand(ROWS - 800, -1)])
        if names == "transformers 5":
            name = name.replace("vision_model.", "").replace("language_model.model.", "language_model.")
            name = name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"
        weights[name] = tensor
    write_shards(folder, weights, "safetensors")

    text = {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    text |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": ROWS}
    text |= {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    vision = {"hidden_size": 32, "image_size": 56, "intermediate_size": 64, "model_type": "clip_vision_model"}
    vision |= {"num_attention_heads": 4, "num_hidden_layers": 3, "patch_size": 14, "projection_dim": 512}
    config = {
        **{"architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": IMAGE_ID},
        **{"model_type": "llava", "pad_token_id": PAD_ID, "projector_hidden_act": "gelu", "text_config": text},
        **{"tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.36.0.dev0"},
        **{"vision_config": vision | {"vocab_size": 32000}, "vision_feature_layer": -2},
        **{"vision_feature_select_strategy": "default", "vocab_size": ROWS},
    }
    write_json(folder / "config.json", config)
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD_ID}
    write_json(folder / "generation_config.json", generation | {"transformers_version": "4.36.0.dev0"})

    processor = {"image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": 14}
    processor |= {"processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default"}
    write_json(folder / "processor_config.json", processor)
    shutil.copyfile(CLIP / "preprocessor_config.json", folder / "preprocessor_config.json")
    edit_json(folder / "preprocessor_config.json", processor_class="LlavaProcessor")
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    )
    _write_llava_hf_tokenizer(folder)
    return folder


def _write_llava_hf_tokenizer(folder: Path) -> None:
    """Vicuna's with `<image>` and `<pad>` behind it."""
    for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(FIXTURES / "llm" / file, folder / file)
    added = {"<image>": IMAGE_ID, "<pad>": PAD_ID}
    write_json(folder / "added_tokens.json", added)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    pipeline = json.loads((folder / "tokenizer.json").read_text())
    pipeline["added_tokens"] += [{"id": index, "content": token, **flags} for token, index in added.items()]
    write_json(folder / "tokenizer.json", pipeline)
    decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    decoder |= {str(index): {"content": token, **flags} for token, index in added.items()}
    edit_json(
        folder / "tokenizer_config.json",
        **{"added_tokens_decoder": decoder, "extra_special_tokens": {"image_token": "<image>"}},
        **{"image_token": "<image>", "pad_token": "<pad>", "padding_side": "left", "processor_class": "LlavaProcessor"},
    )
    edit_json(folder / "special_tokens_map.json", image_token="<image>", pad_token={"content": "<pad>", **flags})
