"""Held-out questions answered by greedy generation and compared with the expected answers.

LLaVA has no evaluation in its training; its loss says little about whether the answers are right. The same questions
can be asked with the pictures shuffled: what a model still gets right then, it did not see.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..data.anyres import Tiles
from ..data.collator import image_tokens, join_images
from ..data.records import RecordStore, missing_image
from ..data.templates import Template, written_answer
from ..data.tokenization import IMAGE_TOKEN_INDEX, BadRecord, expand_images
from .distributed import sum_over_ranks, zero_stage


@dataclass
class Question:
    """A prompt with one token for each picture, its pictures (record, name), and the answer expected."""

    input_ids: np.ndarray
    images: list[tuple[int, str]]
    answer: str


def shuffle_images(questions: Sequence[Question], seed: int) -> list[Question]:
    """The same questions with the pictures of other ones; only questions with equally many pictures are exchanged."""
    shuffled = list(questions)
    generator = torch.Generator().manual_seed(seed)
    for count in {len(question.images) for question in questions} - {0}:
        places = [i for i, question in enumerate(questions) if len(question.images) == count]
        for place, other in zip(places, torch.randperm(len(places), generator=generator).tolist(), strict=True):
            shuffled[place] = replace(questions[place], images=questions[places[other]].images)
    return shuffled


class HeldOut:
    """The questions of `--eval_data_path`, asked before and after training; without the flag it does nothing."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        store: RecordStore | None,
        to_prompt: Callable[[dict], np.ndarray],
        load_pixels: Callable[[str, str], torch.Tensor | Tiles],
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        batch_size: int,
        max_samples: int | None,
        seed: int,
    ):
        """
        Args:
            store: the held-out records; None = none.
            to_prompt: record to the ids up to the answer of its last question, with one token for each image.
            load_pixels: (image folder, image name) to what `collate` takes.
            max_samples: take so many of them, at random.
        """
        self.accelerator, self.model, self.store, self.load_pixels = accelerator, model, store, load_pixels
        self.tokenizer, self.template, self.batch_size, self.seed = tokenizer, template, batch_size, seed
        self.questions: list[Question] = []
        if store is None:
            return
        chosen = range(len(store))
        if max_samples and max_samples < len(store):
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(store), generator=generator)[:max_samples].tolist()
        for index in chosen:
            try:
                record = store[index]
                input_ids = to_prompt(record)
                names = record.get("image", [])
                names = [names] if isinstance(names, str) else names
                if fault := missing_image(store, index, names):
                    raise BadRecord(fault)
                if record["conversations"][-1]["from"] != "gpt":
                    raise BadRecord("its last question has no answer to compare with.")
            except BadRecord as error:
                raise BadRecord(f"--eval_data_path: {store.describe(index)}: {error}") from None
            images = [(index, name) for name in names]
            self.questions.append(Question(input_ids, images, record["conversations"][-1]["value"]))

    def report(self, moment: str, say: Callable[[str], None]) -> None:
        """Says the exact match, also with the pictures exchanged between the questions. All ranks must call it."""
        if not self.questions:
            return
        ask = functools.partial(
            exact_match,
            self.accelerator,
            self.model,
            load_pixels=lambda index, name: self.load_pixels(self.store.image_folder(index), name),
            tokenizer=self.tokenizer,
            template=self.template,
            batch_size=self.batch_size,
        )
        right, without_looking = ask(self.questions), ask(shuffle_images(self.questions, self.seed))
        say(
            f"{len(self.questions):,} held-out questions {moment}: {right:.1%} answered exactly, "
            f"{without_looking:.1%} with the images shuffled."
        )


@torch.no_grad()
def exact_match(
    accelerator: Accelerator,
    model: nn.Module,
    questions: Sequence[Question],
    load_pixels: Callable[[int, str], torch.Tensor | Tiles],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    batch_size: int,
) -> float:
    """Share of the questions whose greedy answer, up to its end marker, is the expected text. All ranks must call it.

    Args:
        model: the prepared `LlavaModel`.
        load_pixels: (record, image name) to what `collate` takes.
        template: which says what ends an answer.
    """
    llava = accelerator.unwrap_model(model)
    was_training, attention = model.training, llava.language_model.config._attn_implementation
    model.eval()
    if attention == "varlen":  # for packed rows without a cache only
        llava.language_model.set_attn_implementation("sdpa")
    stop_ids = [tokenizer.convert_tokens_to_ids(text) for text in template.stop if text in tokenizer.get_vocab()]
    expected = [tokenizer(template.answer_lead + q.answer, add_special_tokens=False).input_ids for q in questions]
    settings = GenerationConfig(
        do_sample=False,
        # An answer longer than the longest expected one is wrong in any case.
        max_new_tokens=4 + max(map(len, expected)),
        eos_token_id=stop_ids or tokenizer.eos_token_id,
        pad_token_id=0,
    )
    by_length = sorted(questions, key=lambda question: (len(question.images), len(question.input_ids)))
    right = 0
    # All ranks take the same number of batches, because under ZeRO-3 each forward is a collective; surplus ranks repeat
    # the first question and do not count it.
    for start in range(0, len(by_length), batch_size * accelerator.num_processes):
        first = start + accelerator.process_index * batch_size
        counted = by_length[first : first + batch_size]
        batch = counted or by_length[:1]
        images, ids = [], []
        for question in batch:
            images_of_question = [load_pixels(*image) for image in question.images]
            tokens = image_tokens(images_of_question, llava.vision_tower.tokens_per_image)
            ids.append(torch.from_numpy(expand_images(question.input_ids, tokens).astype(np.int64)))
            images += images_of_question
        input_ids = pad_sequence(ids, batch_first=True, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side="left")
        is_image = input_ids == IMAGE_TOKEN_INDEX
        pixel_values, feature_rows = join_images(images, llava.vision_tower.image_size)
        with accelerator.autocast():
            embeddings = llava.embed(
                input_ids.masked_fill(is_image, 0).to(accelerator.device),
                pixel_values.to(accelerator.device),
                is_image.flatten().nonzero().squeeze(-1).to(accelerator.device),
                None if feature_rows is None else feature_rows.to(accelerator.device),
            )
            output = llava.language_model.generate(
                inputs_embeds=embeddings,
                attention_mask=mask.to(accelerator.device),
                generation_config=settings,
                synced_gpus=zero_stage(accelerator) == 3,
            )
        texts = tokenizer.batch_decode(output, skip_special_tokens=False)
        answers = [written_answer(template, text) for text in texts]
        right += sum(answer == q.answer.strip() for answer, q in zip(answers, counted, strict=False))
    if attention == "varlen":
        llava.language_model.set_attn_implementation(attention)
    model.train(was_training)
    return sum_over_ranks(accelerator, float(right)).item() / len(questions)
