"""Make the demo's two miniature pretrained models: `python -m mini_llava.demo.pretrain`.

They take the places of CLIP and Vicuna: a vision tower that knows shapes and colours but no language, and a language
model that answers questions about described scenes but has seen no image. Both are trained on easy-vqa's training split
without a tenth of its images, on which the printed accuracies are measured. A few minutes on one H200; slow on a CPU.
"""

import argparse
import json
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mini_llava import demo
from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, tokenize
from mini_llava.training.schedule import learning_rate_factor, warmup_steps

IMAGE_SIZE, PATCH_SIZE = 64, 8
PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
SELECT_LAYER = -2  # the layer whose patches LLaVA projects

# More ways to describe a scene than the conversations of stage 2 use.
SENTENCES = (
    *demo.SCENE_SENTENCES,
    "{shape}, {colour}",
    "one {colour} {shape} on a plain background",
    "in the image there is a {shape}. the color of the {shape} is {colour}.",
    "the {shape} is {colour}",
    "{colour} is the color of the only shape, and the shape is a {shape}",
)
# The other words of a description patch by patch: they tell neither the shape nor the colour.
FILLERS = (
    *("blank", "plain", "background", "empty", "edge", "corner"),
    *("small", "large", "here", "white", "light", "paper"),
)

VOCABULARY_SIZE = 640
MAX_TURNS = 10
MAX_TOKENS = 272
DOCUMENTS = 60_000
HELD_OUT_FRACTION = 0.1
WARMUP_RATIO = 0.03


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=demo.HERE, help="where the two directories are written")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tower_steps", type=int, default=2500, help="optimizer steps for the tower")
    parser.add_argument("--language_steps", type=int, default=3000, help="optimizer steps for the language model")
    parser.add_argument("--batch_size", type=int, default=256, help="images or documents in a step")
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="documents made for the language model")
    parser.add_argument("--held_out_documents", type=int, default=2000, help="documents it is measured on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    questions = demo.read_questions("train")
    images = list(questions)
    random.Random(arguments.seed).shuffle(images)
    cut = int(len(images) * HELD_OUT_FRACTION)
    held_out, kept = ({image: questions[image] for image in part} for part in (images[:cut], images[cut:]))

    start = time.time()
    tower = pretrain_tower(kept, held_out, arguments)
    save_tower(tower, arguments.output / demo.VISION_TOWER.name)
    print(f"vision tower: {tower.num_parameters():,} parameters, {time.time() - start:.0f} s", flush=True)

    start = time.time()
    tokenizer = train_tokenizer(kept)
    language_model = pretrain_language_model(tokenizer, kept, held_out, arguments)
    save_language_model(language_model, tokenizer, arguments.output / demo.LANGUAGE_MODEL.name)
    print(f"language model: {language_model.num_parameters():,} parameters, {time.time() - start:.0f} s", flush=True)


# ---- the tower ----


class TowerHeads(nn.Module):
    """Classifies shape and colour from a tower's class token, and from the patches that LLaVA reads.

    CLIP's objective reads the class token only, and a tower this small would not keep the scene in its patches: they
    are classified too, their mean and each alone.
    """

    def __init__(self, width: int):
        super().__init__()
        classes = len(demo.SHAPES) + len(demo.COLOURS)
        self.pooled = nn.Linear(width, classes)
        self.patches = nn.Linear(width, classes)

    def forward(self, outputs) -> list[torch.Tensor]:
        """Return logits of class token [n, classes], mean patch [n, classes] and each patch [n, patches, classes]."""
        each = self.patches(F.layer_norm(outputs.hidden_states[SELECT_LAYER][:, 1:], (self.patches.in_features,)))
        return [self.pooled(outputs.pooler_output), each.mean(dim=1), each]


def pretrain_tower(kept: dict, held_out: dict, arguments: argparse.Namespace) -> CLIPVisionModel:
    steps, device = arguments.tower_steps, arguments.device
    config = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=64,
        initializer_factor=1.0,
    )
    tower = CLIPVisionModel(config).to(device)
    heads = TowerHeads(config.hidden_size).to(device)
    pixels, targets = (tensor.to(device) for tensor in load_images(kept))
    test_pixels, test_targets = (tensor.to(device) for tensor in load_images(held_out))

    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * learning_rate_factor("cosine", step, steps, warmup_steps(WARMUP_RATIO, steps))
        chosen = torch.randint(len(pixels), (arguments.batch_size,), device=device)
        outputs = tower(normalize(augment(pixels[chosen])), output_hidden_states=True)
        pooled, mean, each = heads(outputs)
        target = targets[chosen]
        loss = scene_loss(pooled, target) + scene_loss(mean, target)
        loss = loss + 0.5 * scene_loss(each.flatten(0, 1), target.repeat_interleave(PATCHES, dim=0))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            with torch.no_grad():
                views = heads(tower(normalize(test_pixels), output_hidden_states=True))
            views[2] = views[2].flatten(0, 1)
            lines = []
            for name, logits in zip(("class token", "mean patch", "single patch"), views, strict=True):
                target = test_targets.repeat_interleave(len(logits) // len(test_targets), dim=0)
                shape, colour = scene_accuracy(logits, target)
                lines.append(f"{name}: shape {shape:.3f}, color {colour:.3f}")
            print(f"tower step {step + 1}: loss {loss.item():.3f}; held out: {'; '.join(lines)}", flush=True)
    return tower


def load_images(questions: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels, fp32 [n, 3, 64, 64] in [0, 1], and shape and colour, int64 [n, 2], -100 where unknown."""
    paths = demo.image_paths("train")
    pixels, targets = [], []
    for image, turns in questions.items():
        shape, colour = demo.shape_and_colour(turns)
        with Image.open(paths[image]) as opened:
            pixels.append(np.asarray(opened.convert("RGB")))
        pairs = ((demo.SHAPES, shape), (demo.COLOURS, colour))
        targets.append([names.index(name) if name else -100 for names, name in pairs])
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255, torch.tensor(targets)


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Mirror, shift and stretch three in four pictures, and add a little noise; borders are extended."""
    n, device = len(pixels), pixels.device
    theta = torch.zeros(n, 2, 3, device=device)
    mirrored = torch.randint(0, 2, (n,), device=device) * 2 - 1
    theta[:, 0, 0] = mirrored * torch.empty(n, device=device).uniform_(0.8, 1.25)
    theta[:, 1, 1] = torch.empty(n, device=device).uniform_(0.8, 1.25)
    theta[:, :, 2] = torch.empty(n, 2, device=device).uniform_(-0.2, 0.2)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    moved = moved + 0.02 * torch.randn_like(moved)
    untouched = torch.rand(n, 1, 1, 1, device=device) < 0.25
    return torch.where(untouched, pixels, moved)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    statistics = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in statistics)
    return (pixels - mean) / std


def scene_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of shape plus that of colour; logits [n, classes], targets [n, 2]."""
    shape, colour = logits.split([len(demo.SHAPES), len(demo.COLOURS)], dim=1)
    return F.cross_entropy(shape, targets[:, 0]) + F.cross_entropy(colour, targets[:, 1])


def scene_accuracy(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    parts = logits.split([len(demo.SHAPES), len(demo.COLOURS)], dim=1)
    return [
        (part.argmax(dim=1) == target)[target >= 0].float().mean().item()
        for part, target in zip(parts, targets.unbind(dim=1), strict=True)
    ]


def save_tower(tower: CLIPVisionModel, folder: Path) -> None:
    tower.half().save_pretrained(folder)
    steps = ("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize")
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        **dict.fromkeys(steps, True),
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "rescale_factor": 1 / 255,
        "image_mean": OPENAI_CLIP_MEAN,
        "image_std": OPENAI_CLIP_STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


# ---- the tokenizer ----


def train_tokenizer(questions: dict) -> PreTrainedTokenizerFast:
    """Return a Llama tokenizer of the demo's words: BPE with ids `<unk>` 0, `<s>` 1, `</s>` 2, 256 bytes, pieces.

    It is trained on single words, and used without pre-tokenization: a blank is U+2581, one is put before the text. No
    piece crosses a blank, so both split a text in the same way. A line break stays a byte.
    """
    scenes = [(shape, colour) for shape in demo.SHAPES for colour in demo.COLOURS]
    texts = [" ".join(FILLERS), *demo.CAPTION_REQUESTS] * 50
    texts += [sentence.format(shape=shape, colour=colour) for sentence in SENTENCES for shape, colour in scenes] * 5
    texts = [f" {text}" for text in texts]
    for turns in questions.values():
        # Words that follow a line break or an end mark are pieces without a blank, too.
        texts += [f"USER:\n{question} ASSISTANT: {answer}" for question, answer in turns]
        texts += [f" {get_template('v1').opening}{question} ASSISTANT: {answer}" for question, answer in turns]
    words = Tokenizer(models.BPE())
    words.normalizer = normalizers.Replace(" ", "▁")
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "removed"),
            pre_tokenizers.Metaspace(prepend_scheme="never", split=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    reserved = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    printable = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=reserved, initial_alphabet=["▁", *printable], show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    trained = json.loads(words.to_str())["model"]

    merges = [tuple(pair) for pair in trained["merges"]]
    settings = {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    tokenizer = Tokenizer(models.BPE(trained["vocab"], merges, **settings))
    tokenizer.add_special_tokens(reserved[:3])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Two steps: with one, a text that begins with a blank would get no second blank, which Llama's tokenizer adds.
    steps = [
        pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
        pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False),
    ]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    begin = {"single": "<s> $A", "pair": "<s> $A <s>:1 $B:1", "special_tokens": [("<s>", 1)]}
    tokenizer.post_processor = processors.TemplateProcessing(**begin)
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    tokenizer.decoder = decoders.Sequence(to_text)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        model_max_length=2048,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


# ---- the language model ----


def describe_in_patches(rng: random.Random, shape: str, colour: str) -> str:
    """Return a description with a word for each patch: the shape, the colour or a filler."""
    named = rng.uniform(0.05, 1.0)
    words = [rng.choice((shape, colour)) if rng.random() < named else rng.choice(FILLERS) for _ in range(PATCHES)]
    for word, place in zip((shape, colour), rng.sample(range(PATCHES), 2), strict=True):
        words[place] = word
    return " ".join(words)


def make_documents(tokenizer, scenes: dict, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids, int16 [number, MAX_TOKENS], 0 after the end, and a mask of the answers with their end marks.

    The trainer's own templates write each document: one in six is a caption (`plain`), the others are conversations
    (`v1`). The captions and six in ten conversations have a description patch by patch in place of an image, with as
    many tokens; the other conversations begin with a sentence.
    """
    rng = random.Random(seed)
    ids = np.zeros((number, MAX_TOKENS), dtype=np.int16)
    answered = np.zeros((number, MAX_TOKENS), dtype=bool)
    scene_list = list(scenes.items())
    for row in range(number):
        (shape, colour), answers = rng.choice(scene_list)
        is_caption = rng.random() < 1 / 6
        in_patches = is_caption or rng.random() < 0.6
        if is_caption:
            turns = [("<image>", f"a {colour} {shape}")]
        else:
            (question, answer), *rest = rng.sample(list(answers.items()), rng.randint(1, MAX_TURNS))
            scene = "<image>" if in_patches else rng.choice(SENTENCES).format(shape=shape, colour=colour)
            turns = [(f"{scene}\n{question}", answer), *rest]
        record = demo.record(f"document-{row}", turns, "description" if in_patches else None)
        template = get_template("plain" if is_caption else "v1")
        sample = tokenize(record, template, tokenizer, PATCHES, MAX_TOKENS)
        if in_patches:
            description = tokenizer(describe_in_patches(rng, shape, colour), add_special_tokens=False)["input_ids"]
            sample.input_ids[sample.input_ids == IMAGE_TOKEN_INDEX] = description
        ids[row, : len(sample.input_ids)] = sample.input_ids
        answered[row, : len(sample.labels)] = sample.labels != IGNORE_INDEX
    return ids, answered


def pretrain_language_model(tokenizer, kept: dict, held_out: dict, arguments: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    device = torch.device(arguments.device)
    model = LlamaForCausalLM(config).to(device)
    kept, held_out = (demo.answers_by_scene(questions) for questions in (kept, held_out))
    documents = make_documents(tokenizer, kept, arguments.documents, arguments.seed)
    documents += make_documents(tokenizer, held_out, arguments.held_out_documents, arguments.seed + 1)
    ids, answered, *held_out_documents = (torch.from_numpy(array).to(device) for array in documents)
    tokens = (ids != 0).sum(1).float().mean().item()
    print(f"{len(ids)} documents, {tokens:.0f} tokens each, vocabulary {len(tokenizer)}")

    steps = arguments.language_steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * learning_rate_factor("cosine", step, steps, warmup_steps(WARMUP_RATIO, steps))
        chosen = torch.randint(len(ids), (arguments.batch_size,), device=device)
        batch, trained = ids[chosen].long(), answered[chosen]
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        # Answers have most weight: the rest is nearly all chance (which question follows, which patch tells what).
        weights = 0.05 * (batch[:, 1:] != 0) + trained[:, 1:]
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 500 == 0 or step + 1 == steps:
            accuracy = text_accuracy(model, tokenizer, *held_out_documents)
            print(f"language step {step + 1}: loss {loss.item():.4f}; held out: {accuracy}", flush=True)
    return model


@torch.no_grad()
def text_accuracy(model, tokenizer, ids: torch.Tensor, answered: torch.Tensor) -> str:
    """Return the share of answers whose every token, end mark included, is the model's first choice.

    By kind: captions, the first turn of a conversation, later turns.
    """
    right = {"captions": [], "first turns": [], "later turns": []}
    for batch, trained in zip(ids.long().split(500), answered.split(500), strict=True):
        hits = model(input_ids=batch, use_cache=False).logits[:, :-1].argmax(dim=-1) == batch[:, 1:]
        for tokens, hit, mask in zip(
            batch.cpu().numpy(), hits.cpu().numpy(), trained[:, 1:].cpu().numpy(), strict=True
        ):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
            for turn, (start, end) in enumerate(edges.reshape(-1, 2)):
                if end == len(mask):
                    continue  # truncated at MAX_TOKENS
                is_caption = tokens[end] != tokenizer.eos_token_id
                kind = "captions" if is_caption else "later turns" if turn else "first turns"
                right[kind].append(hit[start:end].all())
    return ", ".join(f"{kind} {np.mean(values):.4f}" for kind, values in right.items() if values)


def save_language_model(model: LlamaForCausalLM, tokenizer, folder: Path) -> None:
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # save_pretrained names another class in each version of transformers; this one reads tokenizer.json unchanged.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if not re.match("backend|is_local|name_or_path", key)}
    path.write_text(
        json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
