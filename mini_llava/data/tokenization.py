"""One record of LLaVA's format to `input_ids` and `labels`, for every template with one function.

Replaces LLaVA's `preprocess*`, `preprocess_multimodal` and `tokenizer_image_token`. Those tokenize the text again,
round by round, and subtract lengths; whenever the sum is off, the whole sample is masked with a printed warning. Here
the text is rendered into pieces that are trained or not, tokenized once, and a token is trained if it overlaps a
trained piece.
"""

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from .templates import IMAGE_MARK, BadRecord, Template

if TYPE_CHECKING:  # for data that are converted or checked it need not be imported, which takes seconds
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200
NO_PROMPT = ("", "null", "[]", "{}")  # nothing, also as text
OTHER_FORMS = "python -m mini_llava.tools.convert converts other chat formats."
NO_IMAGE = (None, "", [], [""])  # what tables and other tools write under `image` for a record of text


def shorten(value: object) -> str:
    """Return a value from a record as messages show it: on one line, printable and short."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200
    return short.repr(value)


@dataclass(slots=True)
class Sample:
    """A record ready for training.

    input_ids: int32 [L], with a copy of IMAGE_TOKEN_INDEX for each token of an image.
    labels: int32 [L], IGNORE_INDEX where nothing is trained. Not shifted.
    images: file names in the order of the placeholders.
    pictures: the images, a `Picture` each, once `Samples` has opened them.
    several: whether the record has several images, also where it was truncated to fewer.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: list[str]
    pictures: Sequence = ()
    several: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------


def tokenize(
    record: dict,
    template: Template,
    tokenizer: "PreTrainedTokenizerBase",
    tokens_per_image: int | Callable[[str, bool], int],
    max_length: int,
) -> Sample:
    """Tokenize one record, truncated to `max_length` positions (an image counts all its tokens and is never split).

    A token is trained if it overlaps a trained piece of text, so that the blank in front of an answer counts as part
    of it whether or not the tokenizer makes it a token of its own. A last question without an answer stays, untrained.

    Args:
        tokens_per_image: a number, or a function from an image's name and `Sample.several` to a number, whose
            exceptions are passed on.

    Raises BadRecord for anything that is not a conversation, for image marks that do not match the images, and if no
    trained token is left.
    """
    questions, answers, images = read_conversation(record, template)
    if not answers:
        raise BadRecord("no question has an answer, so there is nothing to train on.")
    several = len(images) > 1
    if isinstance(tokens_per_image, int):
        image_tokens = [tokens_per_image] * len(images)
    else:
        image_tokens = [tokens_per_image(name, several) for name in images]
    pieces = template_for(record, template).render(questions, answers)
    input_ids, trained = _encode(pieces, tokenizer, image_tokens)

    if len(input_ids) > max_length:
        length, first_trained = len(input_ids), int(np.argmax(trained))
        end, whole_images = _cut(input_ids, image_tokens, max_length)
        input_ids, trained, images = input_ids[:end], trained[:end], images[:whole_images]
        if not trained.any():
            raise BadRecord(
                f"it has {length} tokens (images included) and its first trained token is at position {first_trained}, "
                f"but --model_max_length is {max_length}: nothing to train on is left."
            )
    return Sample(input_ids, np.where(trained, input_ids, np.int32(IGNORE_INDEX)), images, several=several)


def tokenize_prompt(
    record: dict,
    template: Template,
    tokenizer: "PreTrainedTokenizerBase",
    tokens_per_image: int = 1,
) -> np.ndarray:
    """Return the ids, int32 [L], up to the place where the model is to answer the last question of a record.

    Earlier rounds keep their answers; an answer to the last question is left out. The prompt is rendered and tokenized
    as in training and ends with the assistant's role, without the blank that may follow: these are the first L ids of
    the sample that `tokenize` makes from the same record, unless the tokenizer merges the end of the role with the
    beginning of the answer (a ChatML role ends with a newline; an answer that begins with one may share a token).
    With one token for each image `expand_images` gives them theirs, once the images are known. Raises BadRecord.
    """
    questions, answers, images = read_conversation(record, template)
    asked = answers[: len(questions) - 1]
    pieces = template_for(record, template).render(questions, asked, generation_prompt=True)
    return _encode(pieces, tokenizer, [tokens_per_image] * len(images))[0]


def expand_images(input_ids: np.ndarray, image_tokens: Sequence[int]) -> np.ndarray:
    """Repeat the one IMAGE_TOKEN_INDEX of each image in ids, int32 [n], as often as the image has tokens."""
    copies = np.ones(len(input_ids), np.int64)
    copies[input_ids == IMAGE_TOKEN_INDEX] = image_tokens
    return np.repeat(input_ids, copies)


def template_for(record: dict, template: Template) -> Template:
    """Return the template, with a record's own system prompt, if it has one, in place of the template's.

    A record has it under `system` or in a first turn from `system`; an empty one does not count. Raises BadRecord if it
    is not a text, if there are two, or if the template has no place for it.
    """
    first = record["conversations"][0]
    prompts = [record.get("system"), first["value"] if first["from"] == "system" else None]
    prompts = [prompt for prompt in prompts if prompt and not (isinstance(prompt, str) and prompt.strip() in NO_PROMPT)]
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise BadRecord(f"its 'system' is {shorten(prompt)}; expected a text, the system prompt.")
        if IMAGE_MARK in prompt:
            raise BadRecord(f"its system prompt contains {IMAGE_MARK}, which is only read in questions.")
    if len(set(prompts)) > 1:
        raise BadRecord("it has two system prompts, one under 'system' and another in its first turn.")
    return template.with_system(prompts[0]) if prompts else template


def read_conversation(record: dict, template: Template) -> tuple[list[str], list[str], list[str]]:
    """Check a record and return its questions, its answers (maybe one fewer) and its image names.

    A first turn from `system` is left to `template_for`. As in LLaVA a conversation that begins with the assistant
    loses that turn. Image marks are counted and written the
    template's way: for one image given as a string the mark moves to the front of its turn; a list leaves the marks in
    place.
    """
    turns = _turns(record)
    images, in_place = _images(record)
    if template.captions_only and [role for role, _ in turns] != ["human", "gpt"]:
        raise BadRecord(
            f"the template {template.name} wants one human turn with the image and one gpt turn with its caption, "
            f"found {len(turns)} turn{'s' * (len(turns) != 1)}."
        )
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
    if not turns:
        raise BadRecord("it has no human turn.")
    for index, (role, text) in enumerate(turns):
        if role != ("human", "gpt")[index % 2]:
            raise BadRecord(f"two turns of {role!r} follow each other; human and gpt must alternate.")
        if role == "gpt" and IMAGE_MARK in text:
            raise BadRecord(f"an answer contains {IMAGE_MARK}: a model that writes text cannot produce an image.")

    questions, answers = [text for _, text in turns[0::2]], [text for _, text in turns[1::2]]
    marks = sum(text.count(IMAGE_MARK) for text in questions)
    if marks != len(images):
        raise BadRecord(
            f"it has {marks:,} {IMAGE_MARK} mark{'s' * (marks != 1)} for {len(images):,} "
            f"image{'s' * (len(images) != 1)}; each image needs exactly one mark in a question."
        )
    if template.captions_only:
        if not marks:
            raise BadRecord(f"the template {template.name} needs an image, but this record has none.")
        questions = [IMAGE_MARK * marks]
    elif not in_place:
        questions = [_image_first(text) if IMAGE_MARK in text else text for text in questions]
        if sum(text.count(IMAGE_MARK) for text in questions) != marks:
            raise BadRecord(f"without its {IMAGE_MARK} mark a question reads {IMAGE_MARK} again.")
    if template.image_mark != IMAGE_MARK:
        questions = [text.replace(IMAGE_MARK, template.image_mark) for text in questions]
    return questions, answers, images


def _turns(record: dict) -> list[tuple[str, str]]:
    conversation = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(conversation, list) or not conversation:
        raise BadRecord(f"it has no list 'conversations' of turns. {OTHER_FORMS}")
    turns = []
    for number, turn in enumerate(conversation, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRecord(f"turn {number} is not an object with a 'from' and a text 'value'. {OTHER_FORMS}")
        if turn.get("from") == "system":
            if number > 1:
                raise BadRecord(f"turn {number} is from 'system'; a system prompt is the first turn.")
            continue
        if turn.get("from") not in ("human", "gpt"):
            role = shorten(turn.get("from"))
            raise BadRecord(f"turn {number} is from {role}; known roles are 'human' and 'gpt'. {OTHER_FORMS}")
        turns.append((turn["from"], turn["value"]))
    return turns


def _images(record: dict) -> tuple[list[str], bool]:
    """Return the image names of a record, and whether their marks stay in place."""
    image = record.get("image")
    if image in NO_IMAGE:
        return [], True
    if isinstance(image, str):
        return [image], False
    if isinstance(image, list) and all(isinstance(name, str) and name for name in image):
        return image, True
    raise BadRecord(
        f"its 'image' is {shorten(image)}; expected a file name, a list of file names, or no key 'image' at all."
    )


def _image_first(text: str) -> str:
    return (IMAGE_MARK + "\n" + text.replace(IMAGE_MARK, "").strip()).strip()


# ---------------------------------------------------------------------------------------------------------------------
# Text to ids
# ---------------------------------------------------------------------------------------------------------------------


def _encode(
    pieces: list[tuple[str, bool]], tokenizer: "PreTrainedTokenizerBase", image_tokens: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids, int32 [L], and trained, bool [L], of rendered pieces; `image_tokens`: how many each image takes.

    As in LLaVA the text between two images is tokenized by itself: a Llama tokenizer puts its blank in front of each
    such text, and BOS stands once, at the very beginning: a chat template that writes it leaves none to add.
    """
    encoder, prefix = _encoder(tokenizer, len(tokenizer))
    text, trained_spans = "", []
    for piece, is_trained in pieces:
        if is_trained:
            trained_spans.append((len(text), len(text) + len(piece)))
        text += piece
    if prefix and text.startswith(tokenizer.bos_token):
        prefix = []
    # For tokens after the last trained piece: a span beyond the text.
    trained_spans.append((len(text) + 1, len(text) + 1))
    trained_starts, trained_ends = np.array(trained_spans).T

    ids, trained = [np.array(prefix, dtype=np.int32)], [np.zeros(len(prefix), dtype=bool)]
    position = 0
    for index, chunk in enumerate(text.split(IMAGE_MARK)):
        if index:
            ids.append(np.full(image_tokens[index - 1], IMAGE_TOKEN_INDEX, dtype=np.int32))
            trained.append(np.zeros(image_tokens[index - 1], dtype=bool))
            position += len(IMAGE_MARK)
        if chunk:
            encoding = encoder.encode(chunk, add_special_tokens=False)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + position
            # The first trained span that ends behind the token's start; the token is in it if it starts before its end.
            first_not_passed = np.searchsorted(trained_ends, offsets[:, 0], side="right")
            ids.append(np.array(encoding.ids, dtype=np.int32))
            trained.append(trained_starts[first_not_passed] < offsets[:, 1])
        position += len(chunk)
    return np.concatenate(ids), np.concatenate(trained)


def _cut(input_ids: np.ndarray, image_tokens: list[int], max_length: int) -> tuple[int, int]:
    """Return the largest length up to `max_length` that does not end inside an image, and how many images it holds."""
    kept = int(np.count_nonzero(input_ids[:max_length] == IMAGE_TOKEN_INDEX))
    ends = np.cumsum([0, *image_tokens])
    whole_images = int(np.searchsorted(ends, kept, side="right")) - 1
    return max_length - (kept - int(ends[whole_images])), whole_images


@lru_cache(maxsize=4)
def _encoder(tokenizer: "PreTrainedTokenizerBase", vocabulary_size: int) -> tuple[Tokenizer, list[int]]:
    """Return a copy of the tokenizer's backend with exact offsets, and the ids put before every text: BOS or none.

    Byte-level post-processors may trim blanks off the offsets, and a call with truncation or padding leaves both
    switched on in the shared backend: hence a copy. `vocabulary_size` renews it after tokens have been added.
    """
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.post_processor = None
    encoder.no_truncation()
    encoder.no_padding()
    special = tokenizer("").input_ids
    return encoder, special[:1] if special and special[0] == tokenizer.bos_token_id else []
