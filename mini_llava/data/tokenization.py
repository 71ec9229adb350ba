"""One record of LLaVA's format to `input_ids` and `labels`, for every template with one function.

Replaces LLaVA's `preprocess*`, `preprocess_multimodal` and `tokenizer_image_token`. Those tokenize the text again,
round by round, and subtract lengths; whenever the sum is off, the whole sample is masked with a printed warning. Here
the text is rendered into pieces that are trained or not, tokenized once, and a token is trained if it overlaps a
trained piece. Also here: loading a tokenizer so that it gives the ids LLaVA was trained with, whatever reads it.
"""

import copy
import json
import os
import pickle
import reprlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
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
    """

    input_ids: np.ndarray
    labels: np.ndarray
    images: list[str]


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
) -> Sample:
    """Tokenize one record, cut to `max_length` positions (an image counts all its tokens and is never cut in two).

    A token is trained if it overlaps a trained piece of text, so that the blank in front of an answer counts as part
    of it whether or not the tokenizer makes it a token of its own. A last question without an answer stays, untrained.

    Args:
        tokens_per_image: a number, or what gives it for a folder and an image name, and raises what it likes.
        folder: of the record's images.

    Raises BadRecord for anything that is not a conversation, for image marks that do not match the images, and if no
    trained token is left.
    """
    questions, answers, images = read_conversation(record, template)
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
    record: dict, template: Template, tokenizer: PreTrainedTokenizerBase, tokens_per_image: int = 1
) -> np.ndarray:
    """The ids, int32 [L], up to the place where the model is to answer the last question of a record.

    Earlier rounds keep their answers; an answer to the last question is left out. The prompt is rendered and tokenized
    as in training and ends with the assistant's role, without the blank that may follow: these are the first L ids of
    the sample that `tokenize` makes from the same record, unless the tokenizer merges the end of the role with the
    beginning of the answer (a ChatML role ends with a newline; an answer that begins with one may share a token).
    With one token for each image `expand_images` gives them theirs, once the images are known. Raises BadRecord.
    """
    questions, answers, images = read_conversation(record, template)
    pieces = render(template, questions, answers[: len(questions) - 1], generation_prompt=True)
    return _encode(pieces, tokenizer, [tokens_per_image] * len(images))[0]


def expand_images(input_ids: np.ndarray, image_tokens: Sequence[int]) -> np.ndarray:
    """Ids with one IMAGE_TOKEN_INDEX for each image, int32 [n], to ids with as many as each image takes."""
    copies = np.ones(len(input_ids), np.int64)
    copies[input_ids == IMAGE_TOKEN_INDEX] = image_tokens
    return np.repeat(input_ids, copies)


def read_conversation(record: dict, template: Template) -> tuple[list[str], list[str], list[str]]:
    """Check a record and return its questions, its answers (maybe one fewer) and its image names.

    As in LLaVA a conversation that begins with the assistant loses that turn. Image marks are counted and written the
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
            f"it has {marks} {IMAGE_MARK} mark{'s' * (marks != 1)} for {len(images)} image{'s' * (len(images) != 1)}; "
            f"each image needs exactly one mark in a question."
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


def _image_first(text: str) -> str:
    return (IMAGE_MARK + "\n" + text.replace(IMAGE_MARK, "").strip()).strip()


def check_record(record: dict) -> None:
    """Raises BadRecord if the record cannot be trained on with any template, whatever its images and its length."""
    _, answers, _ = read_conversation(record, get_template("v1"))
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
    only an image; and it needs sentencepiece for folders that hold only `tokenizer.model`. Here such tokenizers are
    rebuilt exactly, `legacy` included, as plain fast tokenizers, and stay exact when saved and loaded by
    AutoTokenizer. All others are loaded as they are. Raises ValueError if that needs code that is not to be trusted.
    """
    config = read_json(path, "tokenizer_config.json")
    backend = _llama_backend(path, config)
    if backend is None:
        if not config and not any(find_file(path, name) for name in TOKENIZER_FILES):
            raise FileNotFoundError(f"{path} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}.")
        about = {"trust_remote_code": trust_remote_code}
        model_type = read_json(path, "config.json").get("model_type", "")
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
    """
    scheme = _prepend_scheme(json.loads(tokenizer.backend_tokenizer.to_str()))
    if scheme is None:
        return None
    added = {index: token.__getstate__() for index, token in tokenizer.added_tokens_decoder.items()}
    added = {index: added[index] for index in added.keys() - _image_tokens(added)}
    special = {key: getattr(tokenizer, key) for key in ("unk_token", "bos_token", "eos_token", "pad_token")}
    return {
        **special,
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
    """The exact pipeline of a Llama-style tokenizer (BPE over blanks written as U+2581), or None for any other."""
    if config.get("tokenizer_class") not in ("LlamaTokenizer", "LlamaTokenizerFast"):
        return None
    tokenizer_file, model_file = find_file(path, "tokenizer.json"), find_file(path, SENTENCEPIECE_FILE)
    if tokenizer_file:
        pipeline = json.loads(Path(tokenizer_file).read_text(encoding="utf-8"))
        scheme = _prepend_scheme(pipeline)
        own = _image_tokens({token["id"]: token for token in pipeline["added_tokens"]})
        pipeline["added_tokens"] = [token for token in pipeline["added_tokens"] if token["id"] not in own]
        for token in pipeline["added_tokens"]:
            token["normalized"] = False  # the slow class looks for them in the text as it is
        backend = Tokenizer.from_str(json.dumps(pipeline))
    elif model_file:
        backend, scheme = _read_sentencepiece(Path(model_file).read_bytes())
    else:
        return None
    if scheme is None:
        return None
    if scheme != "never" and config.get("legacy") is not None:
        scheme = "always" if config["legacy"] else "first"

    # Two steps, because Metaspace leaves out its blank where the text begins with the character that it writes: the
    # first step looks for ordinary blanks, of which the normalizer has left none.
    backend.normalizer = normalizers.Replace(" ", _BLANK)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(" ", prepend_scheme=scheme, split=False),
            pre_tokenizers.Metaspace(_BLANK, prepend_scheme="never", split=False),
        ]
    )
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

    if not tokenizer_file or "add_bos_token" in config or "add_eos_token" in config:
        bos, eos = special["bos_token"], special["eos_token"]
        before = [bos] if config.get("add_bos_token", True) and bos else []
        after = [eos] if config.get("add_eos_token", False) and eos else []
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join([*before, "$A", *after]),
            pair=" ".join([*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *after]),
            special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}],
        )
    return backend


def _prepend_scheme(pipeline: dict) -> str | None:
    """Where a Llama-style tokenizer.json puts its blank: "first", "always" or "never"; None for other kinds."""
    model, normalizer, pre_tokenizer = pipeline["model"], pipeline.get("normalizer"), pipeline.get("pre_tokenizer")
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    if pre_tokenizer is None:  # the old conversion: normalizers, which see each text between special tokens
        steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
        kinds = [step["type"] for step in steps]
        return {("Prepend", "Replace"): "always", ("Replace",): "never"}.get(tuple(kinds))
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if any(step["type"] != "Metaspace" or step.get("split", True) for step in steps):
        return None
    schemes = [step.get("prepend_scheme", "always") for step in steps]
    return next((scheme for scheme in schemes if scheme != "never"), "never")


def _read_sentencepiece(content: bytes) -> tuple[Tokenizer | None, str | None]:
    """Build the BPE of a SentencePiece `tokenizer.model`, and say where it puts its blank; None, None for other kinds.

    The file is a protocol buffer: pieces (field 1: text, score, type), trainer (field 2), normalizer (field 3).
    SentencePiece joins the pair whose joined piece comes first in the vocabulary, the leftmost if there are several.
    """
    pieces, model_type, normalizer = [], None, {}
    for field, value in _protocol_buffer(content):
        if field == 1:
            piece = dict(_protocol_buffer(value))
            pieces.append((piece[1].decode("utf-8"), piece.get(3, 1)))
        elif field == 2:
            model_type = dict(_protocol_buffer(value)).get(3)
        elif field == 3:
            normalizer = dict(_protocol_buffer(value))
    adds_blank, collapses_blanks, character_map = normalizer.get(3, 1), normalizer.get(4, 1), normalizer.get(2)
    if model_type != 2 or collapses_blanks or character_map:  # 2: BPE
        return None, None

    normal = {piece for piece, kind in pieces if kind == 1}
    merges = []
    for piece, kind in pieces:
        if kind == 1:
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            merges += [(left, right) for left, right in halves if left in normal and right in normal]
    vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
    unknown = next(piece for piece, kind in pieces if kind == 2)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    decoder = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*decoder, decoders.Strip(" ", left=1)] if adds_blank else decoder)
    return backend, "always" if adds_blank else "never"  # "always": legacy, the slow class's default


def _protocol_buffer(content: bytes):
    """The (field number, value) pairs of a protocol buffer message; messages and strings come as bytes."""

    def varint(position: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = content[position]
            value |= (byte & 127) << shift
            position, shift = position + 1, shift + 7
            if byte < 128:
                return value, position

    position = 0
    while position < len(content):
        key, position = varint(position)
        kind = key & 7
        if kind == 0:
            value, position = varint(position)
        else:
            size = {1: 8, 5: 4}.get(kind)
            if size is None:
                size, position = varint(position)
            value, position = content[position : position + size], position + size
        yield key >> 3, value


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
