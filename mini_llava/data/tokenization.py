"""One record of LLaVA's format to `input_ids` and `labels`, for every template with one function.

Replaces LLaVA's `preprocess*`, `preprocess_multimodal` and `tokenizer_image_token`. Those tokenize the text again,
round by round, and subtract lengths; whenever the sum is off, the whole sample is masked with a printed warning. Here
the text is rendered into pieces that are trained or not, tokenized once, and a token is trained if it overlaps a
trained piece. Also here: loading a tokenizer so that it gives the ids LLaVA was trained with, whatever reads it.
"""

import copy
import itertools
import json
import os
import pickle
import re
import reprlib
import shlex
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from .templates import IMAGE_MARK, BadRecord, Template, get_template, render
from .unread import unread

PATCH_TOKEN, START_TOKEN, END_TOKEN = "<im_patch>", "<im_start>", "<im_end>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200
# Far beyond what a model can read. A record is tokenized whole before it is cut, and one of a million image marks would
# first become half a billion ids.
MAX_IMAGES = 1024
MAX_CHARACTERS = 4_000_000


def shorten(value: object) -> str:
    """A value from a record as messages show it: on one line, printable and short, whatever it is."""
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
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: list[str]
    pictures: Sequence = ()


# ---------------------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------------------


def tokenize(
    record: dict,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    tokens_per_image: int | Callable[[str | None, str], int],
    max_length: int,
    folder: str | None = None,
    left_unread: Collection[str] = (),
) -> Sample:
    """Tokenize one record, cut to `max_length` positions (an image counts all its tokens and is never cut in two).

    A token is trained if it overlaps a trained piece of text, so that the blank in front of an answer counts as part
    of it whether or not the tokenizer makes it a token of its own. A last question without an answer stays, untrained.

    Args:
        tokens_per_image: a number, or what gives it for a folder and an image name, and raises what it likes.
        folder: of the record's images.
        left_unread: see `read_conversation`.

    Raises BadRecord for anything that is not a conversation, for image marks that do not match the images, and if no
    trained token is left.
    """
    questions, answers, images = read_conversation(record, template, left_unread)
    if not answers:
        raise BadRecord("no question has an answer, so there is nothing to train on.")
    if isinstance(tokens_per_image, int):
        image_tokens = [tokens_per_image] * len(images)
    else:
        image_tokens = [tokens_per_image(folder, name) for name in images]
    input_ids, trained = _encode(render(template, questions, answers), tokenizer, image_tokens)

    if len(input_ids) > max_length:
        length, first_trained = len(input_ids), int(np.argmax(trained))
        end, whole_images = _cut(input_ids, image_tokens, max_length)
        input_ids, trained, images = input_ids[:end], trained[:end], images[:whole_images]
        if not trained.any():
            raise BadRecord(
                f"it has {length} tokens (images included) and its first trained token is at position {first_trained}, "
                f"but --model_max_length is {max_length}: nothing to train on is left."
            )
    return Sample(input_ids, np.where(trained, input_ids, np.int32(IGNORE_INDEX)), images)


def tokenize_prompt(
    record: dict,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    tokens_per_image: int = 1,
    left_unread: Collection[str] = (),
) -> np.ndarray:
    """The ids, int32 [L], up to the place where the model is to answer the last question of a record.

    Earlier rounds keep their answers; an answer to the last question is left out. The prompt is rendered and tokenized
    as in training and ends with the assistant's role, without the blank that may follow: these are the first L ids of
    the sample that `tokenize` makes from the same record, unless the tokenizer merges the end of the role with the
    beginning of the answer (a ChatML role ends with a newline; an answer that begins with one may share a token).
    With one token for each image `expand_images` gives them theirs, once the images are known. Raises BadRecord.
    """
    questions, answers, images = read_conversation(record, template, left_unread)
    pieces = render(template, questions, answers[: len(questions) - 1], generation_prompt=True)
    return _encode(pieces, tokenizer, [tokens_per_image] * len(images))[0]


def expand_images(input_ids: np.ndarray, image_tokens: Sequence[int]) -> np.ndarray:
    """Ids with one IMAGE_TOKEN_INDEX for each image, int32 [n], to ids with as many as each image takes."""
    copies = np.ones(len(input_ids), np.int64)
    copies[input_ids == IMAGE_TOKEN_INDEX] = image_tokens
    return np.repeat(input_ids, copies)


def read_conversation(
    record: dict, template: Template, left_unread: Collection[str] = ()
) -> tuple[list[str], list[str], list[str]]:
    """Check a record and return its questions, its answers (maybe one fewer) and its image names.

    As in LLaVA a conversation that begins with the assistant loses that turn. Image marks are counted and written the
    template's way: for one image given as a string the mark moves to the front of its turn; a list leaves the marks in
    place. What looks like media or a prompt and is read by nobody makes a bad record, unless it is in `left_unread`,
    which `unread.allowed` makes.
    """
    turns = _turns(record)
    images, in_place = _images(record)
    if found := dict(islice(unread(record, [text for role, text in turns if role == "human"], left_unread), 20)):
        raise BadRecord(_of_unread(found))

    if template.captions_only and [role for role, _ in turns] != ["human", "gpt"]:
        raise BadRecord(
            f"the template {template.name} wants one human turn with the image and one gpt turn with its caption, "
            f"found {len(turns)} turn{'s' * (len(turns) != 1)}."
        )
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
    if not turns:
        raise BadRecord("it has no human turn.")
    if (characters := sum(len(text) for _, text in turns)) > MAX_CHARACTERS:
        raise BadRecord(f"its turns have {characters} characters; more than {MAX_CHARACTERS} are refused.")
    for index, (role, text) in enumerate(turns):
        if role != ("human", "gpt")[index % 2]:
            raise BadRecord(f"two turns of {role!r} follow each other; human and gpt must alternate.")
        if role == "gpt" and IMAGE_MARK in text:
            raise BadRecord(f"an answer contains {IMAGE_MARK}: a model that writes text cannot give an image.")

    questions, answers = [text for _, text in turns[0::2]], [text for _, text in turns[1::2]]
    marks = sum(text.count(IMAGE_MARK) for text in questions)
    if marks > MAX_IMAGES:
        raise BadRecord(f"it has {marks} {IMAGE_MARK} marks; more than {MAX_IMAGES} are refused.")
    if marks != len(images):
        raise BadRecord(
            f"it has {marks:,} {IMAGE_MARK} mark{'s' * (marks != 1)} for {len(images):,} "
            f"image{'s' * (len(images) != 1)}; each image needs exactly one mark in a question."
        )
    if template.captions_only:
        if not marks:
            raise BadRecord(f"the template {template.name} wants an image, this record has none.")
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
        raise BadRecord("it has no list 'conversations' of turns.")
    turns = []
    for number, turn in enumerate(conversation, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRecord(f"turn {number} is not an object with a 'from' and a text 'value'.")
        if turn.get("from") not in ("human", "gpt"):
            raise BadRecord(f"turn {number} is from {shorten(turn.get('from'))}; known roles are 'human' and 'gpt'.")
        try:
            turn["value"].encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can escape what no text file can hold
            half = error.object[error.start]
            raise BadRecord(f"turn {number} holds {half!r}, half of a pair of characters.") from None
        turns.append((turn["from"], turn["value"]))
    return turns


def _images(record: dict) -> tuple[list[str], bool]:
    """The image names of a record, and whether their marks stay in place."""
    if "image" not in record:
        return [], True
    image = record["image"]
    if isinstance(image, str) and image:
        return [image], False
    if isinstance(image, list) and all(isinstance(name, str) and name for name in image):
        return image, True
    raise BadRecord(
        f"its 'image' is {shorten(image)}; expected a file name, a list of file names, or no key 'image' at all."
    )


def _of_unread(found: dict[str, str]) -> str:
    """A sentence about the first of what `unread` found, and the flag that lets all of it pass."""
    flag = " ".join(["--leave_unread", *(shlex.quote(name[:200]) for name in found)])
    name, kind = next(iter(found.items()))
    shown = shorten(name)
    if kind == "mark":
        return (
            f"a question has the mark {shown}, which is not read: an image's place is marked by {IMAGE_MARK}, other "
            f"media are not known. Write {IMAGE_MARK} for an image, or leave it in the text by {flag}."
        )
    if kind == "prompt":
        return (
            f"its key {shown} looks like a prompt and is not read: the template has a system prompt of its own. Put it "
            f"into the first question, or train without it by {flag}."
        )
    return (
        f"its key {shown} looks like media and is not read: images are read from the record's 'image' alone, other "
        f"media not at all. Put the name of an image under 'image', or train without it by {flag}."
    )


def _image_first(text: str) -> str:
    return (IMAGE_MARK + "\n" + text.replace(IMAGE_MARK, "").strip()).strip()


def check_record(record: dict, left_unread: Collection[str] = ()) -> None:
    """Raises BadRecord if the record cannot be trained on with any template, whatever its images and its length."""
    _, answers, _ = read_conversation(record, get_template("v1"), left_unread)
    if not answers:
        raise BadRecord("no question has an answer, so there is nothing to train on.")


# ---------------------------------------------------------------------------------------------------------------------
# Text to ids
# ---------------------------------------------------------------------------------------------------------------------


def _encode(
    pieces: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, image_tokens: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32 [L], and trained, bool [L], of rendered pieces; `image_tokens` says how many each image takes.

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
    # Tokens after the last trained piece meet a span that begins beyond the text.
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
            first_not_passed = np.searchsorted(trained_ends, offsets[:, 0], side="right")
            ids.append(np.array(encoding.ids, dtype=np.int32))
            trained.append(trained_starts[first_not_passed] < offsets[:, 1])
        position += len(chunk)
    return np.concatenate(ids), np.concatenate(trained)


def _cut(input_ids: np.ndarray, image_tokens: list[int], max_length: int) -> tuple[int, int]:
    """The largest length of at most `max_length` that does not end inside an image, and how many images it holds."""
    kept = int(np.count_nonzero(input_ids[:max_length] == IMAGE_TOKEN_INDEX))
    ends = np.cumsum([0, *image_tokens])
    whole_images = int(np.searchsorted(ends, kept, side="right")) - 1
    return max_length - (kept - int(ends[whole_images])), whole_images


@lru_cache(maxsize=4)
def _encoder(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> tuple[Tokenizer, list[int]]:
    """A copy of the tokenizer's backend that keeps exact offsets, and the ids put before every text: BOS or none.

    Byte-level post-processors may trim blanks off the offsets, and a call with truncation or padding leaves both
    switched on in the shared backend: hence a copy. `vocabulary_size` renews it after tokens have been added.
    """
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.post_processor = None
    encoder.no_truncation()
    encoder.no_padding()
    special = tokenizer("").input_ids
    return encoder, special[:1] if special and special[0] == tokenizer.bos_token_id else []


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------------------------------

SENTENCEPIECE_FILE = "tokenizer.model"
_BLANK = "▁"


@contextmanager
def foreign_code_refused(path: str | os.PathLike) -> Iterator[None]:
    """Turns the refusal of transformers or torch to run code from `path` into a ValueError with one sentence.

    Every `from_pretrained` that could run code stands in here and is told `trust_remote_code` as True or False: with
    None transformers asks at the terminal.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"The weights in {path} are damaged, or a pickle of something other than tensors, which could run code "
            f"when read. They were not loaded; take .safetensors files."
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{path} brings Python code of its own, which was not run. Read it, and if you trust it, allow it by "
            f"--trust_remote_code."
        ) from error


def load_tokenizer(path: str | os.PathLike, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer, folder or hub name, so that its ids are those LLaVA trains with.

    LLaVA reads Llama tokenizers with transformers 4.37's slow class. transformers 5 rebuilds them in the tokenizers
    library without the blank before a text that itself begins with a blank, such as the text after a question that is
    only an image; and of folders that hold only `tokenizer.model` it orders the merges by id, not by score. Here such
    tokenizers are rebuilt exactly, `legacy` included, as plain fast tokenizers, and stay exact when saved and loaded by
    AutoTokenizer. All others are loaded as they are. Raises ValueError if that needs code that is not to be trusted,
    and for a `tokenizer.model` that cannot be read or not be rebuilt exactly.
    """
    config = read_json(path, "tokenizer_config.json")
    model_type = read_json(path, "config.json").get("model_type", "")
    if not config.get("tokenizer_class") and model_type.removeprefix("llava_") in ("llama", "mistral", "mixtral"):
        # The class that LLaVA's AutoTokenizer takes then, and its defaults.
        config = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **config}
        config["tokenizer_class"] = "LlamaTokenizer"
    backend = _llama_backend(path, config)
    if backend is None:
        if not config and not any(find_file(path, name) for name in TOKENIZER_FILES):
            raise FileNotFoundError(f"{path} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}.")
        about = {"trust_remote_code": trust_remote_code}
        if model_type.startswith("llava_") and model_type not in CONFIG_MAPPING:
            # LLaVA's own layout, which transformers does not know: it stumbles over Llama 3's RoPE scaling there.
            about["config"] = PreTrainedConfig()
        with foreign_code_refused(path):
            return AutoTokenizer.from_pretrained(path, **about)

    # What describes the pipeline is now in tokenizer.json; the rest of the configuration is kept.
    config = {**read_json(path, "special_tokens_map.json"), **config, "tokenizer_class": "PreTrainedTokenizerFast"}
    for key in (
        *("auto_map", "legacy", "sp_model_kwargs", "add_prefix_space", "use_default_system_prompt"),
        *("add_bos_token", "add_eos_token", "added_tokens_decoder"),
    ):
        config.pop(key, None)
    for key in ("unk_token", "bos_token", "eos_token", "pad_token"):
        if isinstance(config.get(key), dict):
            config[key] = config[key]["content"]
    if backend.token_to_id(IMAGE_MARK) is None:  # nor shall the configuration bring back what was left out
        for key in ("image_token", "extra_special_tokens", "additional_special_tokens"):
            if IMAGE_MARK in str(config.get(key)):
                del config[key]
                config["pad_token"] = config.get("unk_token")  # as in LLaVA's own
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        chat_template = find_file(path, "chat_template.jinja")
        if chat_template:
            (Path(folder) / "chat_template.jinja").write_bytes(Path(chat_template).read_bytes())
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.name_or_path = str(path)
    return tokenizer


def add_image_tokens(tokenizer: PreTrainedTokenizerBase, template: Template, start_end: bool, patch: bool) -> Template:
    """Adds the tokens of LLaVA's older models to the tokenizer; returns the template that puts them around an image.

    `<im_patch>` never stands in a text: it only takes its place in the vocabulary, the first one. In LLaVA the template
    for captions drops start and end again; here they are in it, since stage 1 trains them.
    """
    names = [PATCH_TOKEN] * patch + [START_TOKEN, END_TOKEN] * start_end
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    if not start_end:
        return template
    return replace(template, image_mark=template.image_mark.replace(IMAGE_MARK, START_TOKEN + IMAGE_MARK + END_TOKEN))


def image_token_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that knows `<image>` as one token, for processors that tokenize the whole text at once.

    It gives the ids that `tokenize` makes from the chunks between images: after a run of `<image>` a Llama tokenizer
    begins a new text and puts its blank there. That holds for any number of `<image>` in a row and survives
    `save_pretrained`. A tokenizer that has `<image>` already is returned unchanged.
    """
    if IMAGE_MARK in tokenizer.get_vocab():
        return tokenizer
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if _prepend_scheme(json.loads(backend.to_str())) != "first":
        with_image = copy.deepcopy(tokenizer)
        with_image.add_tokens([AddedToken(IMAGE_MARK, normalized=False, special=True)])
        return with_image

    # The blank of the whole text is the pre-tokenizer's, and comes at offset 0 only. The normalizer can see what
    # follows an image, provided that the mark is looked for after it has run: hence normalized=True.
    after_image = normalizers.Replace(Regex(f"{IMAGE_MARK}(?!{IMAGE_MARK})(?=[\\s\\S])"), IMAGE_MARK + _BLANK)
    backend.normalizer = normalizers.Sequence(
        [backend.normalizer, after_image] if backend.normalizer else [after_image]
    )
    backend.add_special_tokens([AddedToken(IMAGE_MARK, normalized=True, special=True)])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        backend.save(str(Path(folder) / "tokenizer.json"))
        with_image = PreTrainedTokenizerFast.from_pretrained(folder)
    with_image.name_or_path = tokenizer.name_or_path
    return with_image


def slow_llama_config(tokenizer: PreTrainedTokenizerBase) -> dict | None:
    """The `tokenizer_config.json` with which transformers 4's slow class, LLaVA's, reads the `tokenizer.model` of a
    Llama tokenizer and gives the same ids; None for other tokenizers. `<image>`, which LLaVA replaces before it
    tokenizes, is left out.

    Every special token is listed by name, too: the slow class writes a blank before a text that begins with an added
    token, such as `<im_end>` after an image, unless it is listed. A token that is not special, which decoding is to
    keep, cannot be listed; a text that begins with it has that blank there.
    """
    scheme = _prepend_scheme(json.loads(tokenizer.backend_tokenizer.to_str()))
    if scheme is None:
        return None
    added = {index: token.__getstate__() for index, token in tokenizer.added_tokens_decoder.items()}
    added = {index: added[index] for index in added.keys() - _image_tokens(added)}
    special = {key: getattr(tokenizer, key) for key in ("unk_token", "bos_token", "eos_token", "pad_token")}
    listed = [token["content"] for _, token in sorted(added.items()) if token["special"]]
    return {
        **special,
        "additional_special_tokens": [token for token in listed if token not in special.values()],
        "tokenizer_class": "LlamaTokenizer",
        "legacy": scheme != "first",
        "add_bos_token": bool(_encoder(tokenizer, len(tokenizer))[1]),
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "sp_model_kwargs": {},
    }


def _image_tokens(added: dict[int, dict]) -> set[int]:
    """Ids of `<image>`, and of the padding that transformers' LLaVA models have behind it, among added tokens.

    LLaVA's own tokenizers have neither, and a text that happens to spell them is tokenized like any other.
    """
    image = next((index for index, token in added.items() if token["content"] == IMAGE_MARK), None)
    if image is None:
        return set()
    behind = {index for index in added if index >= image}
    return behind if {added[index]["content"] for index in behind} <= {IMAGE_MARK, "<pad>"} else set()


def _llama_backend(path: str | os.PathLike, config: dict) -> Tokenizer | None:
    """The exact pipeline of a Llama-style tokenizer (BPE over blanks written as U+2581), or None for any other.

    A tokenizer.json of the class that is something else (a unigram model, or one with a normalizer of its own) is
    returned as it stands: transformers 5 would rebuild it as a BPE without a normalizer.
    """
    if config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return None
    tokenizer_file, model_file = find_file(path, "tokenizer.json"), find_file(path, SENTENCEPIECE_FILE)
    if tokenizer_file:
        pipeline = json.loads(Path(tokenizer_file).read_text(encoding="utf-8"))
        scheme, marks = _prepend_scheme(pipeline), _marks(pipeline.get("pre_tokenizer"))
        if scheme is None and pipeline["model"].get("type") == "BPE" and not pipeline["model"].get("byte_fallback"):
            return None  # byte-level, which transformers recognises
        own = _image_tokens({token["id"]: token for token in pipeline["added_tokens"]})
        pipeline["added_tokens"] = [token for token in pipeline["added_tokens"] if token["id"] not in own]
        for token in pipeline["added_tokens"]:
            token["normalized"] &= scheme is None  # the slow class looks for them in the text as it is
        backend = Tokenizer.from_str(json.dumps(pipeline))
        marks = pre_tokenizers.Split(Regex(marks["pattern"]["Regex"]), "isolated") if marks else None
    elif model_file:
        backend, asks_for_blank = _read_sentencepiece(model_file)
        scheme, marks = "always" if asks_for_blank else "never", backend.pre_tokenizer
    else:
        return None

    if scheme is not None:
        # The slow class leaves the blank to the file if it is legacy, its default; otherwise it writes one itself.
        if config.get("legacy") is False and (scheme != "never" or not tokenizer_file):
            scheme = "first"
        elif config.get("legacy") and scheme == "first":
            scheme = "always"
        # Two steps, because Metaspace leaves out its blank where the text begins with the character that it writes: the
        # first step looks for ordinary blanks, of which the normalizer has left none.
        backend.normalizer = normalizers.Replace(" ", _BLANK)
        steps = [
            pre_tokenizers.Metaspace(" ", prepend_scheme=scheme, split=False),
            pre_tokenizers.Metaspace(_BLANK, prepend_scheme="never", split=False),
        ]
        backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, marks] if marks else steps)
    if not tokenizer_file:
        decoder = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
        strip = [decoders.Strip(" ", left=1)] if scheme != "never" else []
        backend.decoder = decoders.Sequence(decoder + strip)
    _add_tokens(backend, path, config, keep_post_processor=tokenizer_file is not None)
    return backend


def _add_tokens(backend: Tokenizer, path: str | os.PathLike, config: dict, keep_post_processor: bool) -> None:
    """Add the special and added tokens that a tokenizer's configuration names, and what stands before and after a text.

    `keep_post_processor`: the backend has one already; only what the configuration says replaces it. Raises ValueError
    for an added token whose id is not the next one.
    """
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    for key, default in special.items():
        value = config.get(key, default)
        special[key] = value["content"] if isinstance(value, dict) else value
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special.values() if token])
    added = {index: {"content": content} for content, index in read_json(path, "added_tokens.json").items()}
    added |= {int(index): token for index, token in config.get("added_tokens_decoder", {}).items()}
    for index in _image_tokens(added):
        del added[index]
    for index, token in sorted(added.items()):
        flags = {key: token.get(key, False) for key in ("lstrip", "rstrip", "single_word", "special")}
        backend.add_tokens([AddedToken(token["content"], normalized=False, **flags)])
        if backend.token_to_id(token["content"]) != index:
            raise ValueError(
                f"The tokenizer in {path} gives its added token {token['content']!r} the id {index}, but its "
                f"vocabulary ends before that: the ids of added tokens must follow without a gap."
            )

    if not keep_post_processor or "add_bos_token" in config or "add_eos_token" in config:
        bos, eos = special["bos_token"], special["eos_token"]
        before = [bos] if config.get("add_bos_token", True) and bos else []
        after = [eos] if config.get("add_eos_token", False) and eos else []
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join([*before, "$A", *after]),
            pair=" ".join([*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *after]),
            special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}],
        )


def _prepend_scheme(pipeline: dict) -> str | None:
    """Where a Llama-style tokenizer.json puts its blank: "first", "always" or "never"; None for other kinds."""
    model, normalizer, pre_tokenizer = pipeline["model"], pipeline.get("normalizer"), pipeline.get("pre_tokenizer")
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    rewrites = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if pre_tokenizer is None:  # the old conversion: normalizers, which see each text between special tokens
        kinds = [step["type"] for step in rewrites]
        return {("Prepend", "Replace"): "always", ("Replace",): "never"}.get(tuple(kinds))
    if any(step.get("pattern") != {"String": " "} and IMAGE_MARK not in str(step) for step in rewrites):
        return None
    steps = [step for step in _steps(pre_tokenizer) if step != _marks(pre_tokenizer)]
    if any(step["type"] != "Metaspace" or step.get("split", True) for step in steps):
        return None
    schemes = [step.get("prepend_scheme", "always") for step in steps]
    return next((scheme for scheme in schemes if scheme != "never"), "never")


def _steps(pre_tokenizer: dict) -> list[dict]:
    return pre_tokenizer.get("pretokenizers", [pre_tokenizer])


def _marks(pre_tokenizer: dict | None) -> dict | None:
    """The last step of a pipeline, if it is the one that isolates user-defined pieces."""
    last = _steps(pre_tokenizer)[-1] if pre_tokenizer else {}
    return last if last.get("type") == "Split" and last.get("behavior") == "Isolated" else None


def _read_sentencepiece(file: str) -> tuple[Tokenizer, bool]:
    """Build the BPE of a SentencePiece `tokenizer.model`, and say whether the file asks for a blank before a text.

    Raises ValueError if the file cannot be read, or if SentencePiece does with it what cannot be rebuilt exactly.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except ImportError as error:
        raise ValueError(f"{file} needs packages that are missing: pip install sentencepiece protobuf.") from error
    try:
        model = ModelProto.FromString(Path(file).read_bytes())
    except DecodeError:
        model = ModelProto()
    if not (model.pieces and model.HasField("trainer_spec")):  # which stands behind the pieces
        raise ValueError(f"{file} is not a SentencePiece model, or only a part of one. Download it again.")

    kind = ModelProto.SentencePiece
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == kind.NORMAL}
    user_defined = [piece.piece for piece in model.pieces if piece.type == kind.USER_DEFINED]
    unknown = next((piece.piece for piece in model.pieces if piece.type == kind.UNKNOWN), None)
    merges = _merges(scores)
    if reason := _why_not_exact(model, scores, merges, user_defined):
        raise ValueError(
            f"{file} {reason}, so that ids other than SentencePiece's would come out here. Put a tokenizer.json with "
            f"the ids that the language model was trained with beside it: where there is one, it is what is read."
        )

    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    settings = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=bool(user_defined), **settings))
    if user_defined:
        # They are isolated, and an isolated text that is a piece becomes that piece (ignore_merges). The name of a
        # control or byte piece, spelled in a text, is split, lest it becomes one between two of them.
        patterns = [re.escape(mark) for mark in sorted(user_defined, key=len, reverse=True)]
        names = vocabulary.keys() - scores.keys() - set(user_defined)
        patterns += [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in sorted(names)]
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(patterns)), "isolated")
    return backend, model.normalizer_spec.add_dummy_prefix


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE, first the one to be done first.

    SentencePiece joins the pair whose joined piece has the highest score, and of equal ones the leftmost. Ids say
    nothing about it: Llama 2 has its runs of blanks under ids from 259 on and scores of -1e9. All of these have one
    score; there the pair furthest to the left is the one with the longest left half.
    """
    merges = [
        (piece[:end], piece[end:])
        for piece in scores
        for end in range(1, len(piece))
        if piece[:end] in scores and piece[end:] in scores
    ]
    return sorted(merges, key=lambda pair: (-scores["".join(pair)], -len(pair[0]), -len(pair[1])))


def _why_not_exact(
    model, scores: dict[str, float], merges: list[tuple[str, str]], user_defined: list[str]
) -> str | None:
    """What the tokenizers library cannot do as SentencePiece does it, or None."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE:
        return f"holds a model of type {trainer.ModelType.Name(trainer.model_type)}, not BPE"
    if normalizer.precompiled_charsmap:
        return f"replaces characters ({normalizer.name or 'a table of its own'})"
    if normalizer.remove_extra_whitespaces:
        return "leaves out the second of two blanks"
    if trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        return "does not put its blanks in front of words"
    if any(piece.type == piece.UNUSED for piece in model.pieces):
        return "marks pieces as unused"
    known = scores.keys() | set(user_defined)
    for piece in scores:
        if not known >= set(piece):
            return f"has the piece {piece!r}, but not each of its characters as a piece"
    # Where pairs of one score compete the place decides, and here the order of the merges. The outcome is the same if
    # they have no half in common, and none of them becomes a half of what comes before, and for runs of a character.
    halves = set()
    for score, group in itertools.groupby(merges, key=lambda pair: scores["".join(pair)]):
        pairs = list(group)
        pieces = list(dict.fromkeys(map("".join, pairs)))
        left, right = ({pair[side] for pair in pairs} for side in (0, 1))
        halves |= left | right
        competing = left & right or halves.intersection(pieces)
        if len(pieces) > 1 and len(set("".join(pieces))) > 1 and competing:
            return f"gives {len(pieces)} pieces the score {score + 0:g}, {pieces[0]!r} and {pieces[1]!r} among them"
    if user_defined:
        from sentencepiece import SentencePieceProcessor

        without_blank = type(model).FromString(model.SerializeToString())
        without_blank.normalizer_spec.add_dummy_prefix = False
        processor = SentencePieceProcessor(model_proto=without_blank.SerializeToString())
        for piece, found in zip(scores, processor.encode(list(scores), out_type=str), strict=True):
            if len(found) > 1 and not set(found) & set(user_defined):
                return f"has user-defined pieces, and the piece {piece!r} that no text becomes"
    return None


def find_file(path: str | os.PathLike, name: str) -> str | None:
    """A file of a folder or of a hub repository, or None if it has none of that name.

    Raises OSError: there is no such repository, or nothing of it is here and the hub cannot be asked; a sentence.
    """
    if os.path.isdir(path):
        file = os.path.join(path, name)
        return file if os.path.isfile(file) else None
    try:
        return cached_file(str(path), name)
    except OSError as error:
        reason = error.__cause__
        if reason is None:  # the repository is there, and has no such file
            return None
        if isinstance(reason, LocalEntryNotFoundError) and isinstance(try_to_load_from_cache(path, "config.json"), str):
            return None  # what is here is all that can be known
        raise OSError(_why_not_on_the_hub(path, error, reason)) from error


def _why_not_on_the_hub(path: str | os.PathLike, error: OSError, reason: BaseException) -> str:
    hub, elsewhere = constants.ENDPOINT, f"fetch it where there is a network (hf download {path}), or give a directory."
    if isinstance(reason, GatedRepoError):
        return f"{path} is gated on {hub}: accept its conditions on its page there, and log in with hf auth login."
    if isinstance(reason, RepositoryNotFoundError):
        return f"{path} is neither a directory here nor a model on {hub} (a private one needs hf auth login)."
    if isinstance(reason, ValueError):
        return f"{path} is neither a directory here nor a name on the hub, which is owner/name."
    if isinstance(reason, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return f"{path} is not here, and HF_HUB_OFFLINE keeps the hub from being asked: unset it, {elsewhere}"
    if isinstance(reason, LocalEntryNotFoundError):
        why = " ".join(str(reason.__cause__ or reason).split())
        return f"{path} is not here, and the hub {hub} cannot be reached ({why}): {elsewhere}"
    return f"{path} could not be read from {hub}: {' '.join(str(error).split())}"


def read_json(path: str | os.PathLike, name: str) -> dict:
    file = find_file(path, name)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else {}
