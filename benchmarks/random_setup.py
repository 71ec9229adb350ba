"""What the benchmarks train: models of real shapes with random weights, and records with the lengths of LLaVA's mix.

    python benchmarks/random_setup.py --directory /tmp/bench --shape 7b --records 2560

Speed does not depend on what the weights know, but it does on their not being zeros, and on real files: pictures are
decoded from JPEG and weights read from safetensors, as in training. The tokenizer has one token for each of its words,
as many as the language model has rows, of which the records use the first 32,000.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

VOCABULARY = 32_000
LANGUAGE_MODELS = {
    "tiny": dict(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4),
    "7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    "13b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
}
QWEN2_HALF_B = dict(  # Qwen2-0.5B
    **dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14),
    **dict(num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True, rope_theta=1e6),
)
SHAPES = (*LANGUAGE_MODELS, "0.5b", "0.5b-384")
CLIP_L_336 = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336
)
TINY_CLIP = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=56)
SIGLIP_B_512 = dict(
    **dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    **dict(image_size=512, patch_size=16),
)
TEMPLATE_TOKENS, TEMPLATE_TOKENS_A_ROUND = 23, 3  # of v1: the system prompt; roles and end of an answer
PICTURES, PICTURE_SIZE = 512, (640, 480)  # the pixels of a COCO photograph


def make_models(directory: Path, shape: str, layers: int | None = None) -> None:
    """Writes `language_model` and `vision_tower`: weights in bf16, made where there is a GPU on it.

    `shape`: tiny, 7b and 13b are Llama's with CLIP-L/14-336, 0.5b is Qwen2's with SigLIP-B/16-512 (1,024 tokens an
    image), 0.5b-384 with SigLIP-B/16-384 (576).
    `layers`: of the language model, if not as many as that shape has.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    changed = dict(max_position_embeddings=4096) | ({"num_hidden_layers": layers} if layers else {})
    if shape.startswith("0.5b"):
        size = 384 if shape == "0.5b-384" else SIGLIP_B_512["image_size"]
        language_model = Qwen2ForCausalLM, Qwen2Config(**QWEN2_HALF_B | changed)
        vision_tower = SiglipVisionModel, SiglipVisionConfig(**SIGLIP_B_512 | {"image_size": size})
        image_processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    else:
        language_model = LlamaForCausalLM, LlamaConfig(vocab_size=VOCABULARY, **LANGUAGE_MODELS[shape] | changed)
        vision = TINY_CLIP if shape == "tiny" else CLIP_L_336
        vision_tower = CLIPVisionModel, CLIPVisionConfig(patch_size=14, **vision)
        size = vision["image_size"]
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        for folder, (model, config) in (("language_model", language_model), ("vision_tower", vision_tower)):
            model(config).save_pretrained(directory / folder, max_shard_size="2GB")
    torch.set_default_dtype(torch.float32)
    image_processor.save_pretrained(directory / "vision_tower")

    special = ["<unk>", "<s>", "</s>"]
    words = special + [f"w{number}" for number in range(language_model[1].vocab_size - len(special))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=4096
    ).save_pretrained(directory / "language_model")


def draw_conversation(random: np.random.Generator) -> tuple[bool, int]:
    """Whether a record of stage 2 has an image, and how many tokens its text."""
    if random.random() < 0.06:
        return False, min(2048, int(random.lognormal(6.6, 0.7)))
    return True, int(np.clip(random.lognormal(5.3, 0.6), 40, 1400))


def make_records(directory: Path, count: int, pictures: int = PICTURES, zipf: float = 0.0) -> None:
    """Writes `stage1.json` (captions of about 20 tokens), `stage2.json` and the pictures they share.

    Stage 2: an image and text of lognormal(5.3, 0.6) tokens, 40 to 1400, in rounds of about 60; 6 % without an image,
    lognormal(6.6, 0.7), up to 2048. The text's tokens are all but the image's, the template's words included; half of
    the others are answers.

    `zipf`: a word's frequency falls with this power of its rank, so that there is something to learn; 0: all the same.
    """
    (directory / "images").mkdir(exist_ok=True)
    with ProcessPoolExecutor() as processes:
        list(processes.map(_picture, range(pictures), [directory] * pictures, chunksize=16))
    random = np.random.default_rng(0)
    words = VOCABULARY - 3
    frequencies = np.arange(1, words + 1, dtype=np.float64) ** -zipf

    def text(tokens: int) -> str:
        if zipf:
            numbers = random.choice(words, max(1, tokens), p=frequencies / frequencies.sum())
        else:
            numbers = random.integers(0, words, max(1, tokens))
        return " ".join(f"w{number}" for number in numbers)

    captions, conversations = [], []
    for number in range(count):
        image = {"image": f"{number % pictures}.jpg"}
        caption = {"from": "gpt", "value": text(int(random.integers(12, 29)))}
        captions.append(image | {"conversations": [{"from": "human", "value": "<image>"}, caption]})
        has_image, tokens = draw_conversation(random)
        image = image if has_image else {}
        rounds = max(1, tokens // 60)
        said = (tokens - TEMPLATE_TOKENS - TEMPLATE_TOKENS_A_ROUND * rounds) // (2 * rounds)
        turns = [{"from": role, "value": text(said)} for _ in range(rounds) for role in ("human", "gpt")]
        if image:
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        conversations.append(image | {"conversations": turns})
    (directory / "stage1.json").write_text(json.dumps(captions))
    (directory / "stage2.json").write_text(json.dumps(conversations))


def _picture(number: int, directory: Path) -> None:
    """Blurred noise, which takes about as many bytes as a photograph of its size (some 100 kB) at quality 90."""
    noise = np.random.default_rng(number).integers(0, 256, (*PICTURE_SIZE[::-1], 3), dtype=np.uint8)
    picture = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1.2))
    picture.save(directory / "images" / f"{number}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int, help="of the language model, default the shape's")
    parser.add_argument("--records", type=int, default=2560)
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    make_records(arguments.directory, arguments.records)
    make_models(arguments.directory, arguments.shape, arguments.layers)


if __name__ == "__main__":
    main()
