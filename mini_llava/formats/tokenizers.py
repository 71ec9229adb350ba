"""Read tokenizers so that they give the ids that LLaVA was trained with, and write them for transformers 4 and 5.

Replaces transformers 4's slow Llama class, which LLaVA uses and version 5 no longer has.
"""

import copy
import itertools
import json
import os
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..data.templates import IMAGE_MARK
from ..errors import UserError
from ..hub import find_file, foreign_code_refused, read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
SENTENCEPIECE_FILE = "tokenizer.model"
BOS_IN_TEMPLATE = "bos_in_chat_template"  # of this program, in tokenizer_config.json
_BLANK = "▁"


def load_tokenizer(path: str | os.PathLike, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer, folder or hub name, with the ids that LLaVA trains with.

    LLaVA reads Llama tokenizers with transformers 4.37's slow class. transformers 5 rebuilds them without the blank
    before a text that itself begins with a blank, such as the text after a question that is only an image; and from a
    `tokenizer.model` alone it orders the merges by id, not by score. Here they are rebuilt exactly, `legacy` included,
    as fast tokenizers that stay exact when AutoTokenizer loads them. Others are loaded as tokenizer.json has them.
    Raises UserError for code that is not trusted, and for a `tokenizer.model` that cannot be read or rebuilt exactly.
    """
    config = read_json(path, "tokenizer_config.json")
    model_type = read_json(path, "config.json").get("model_type", "")
    if not config.get("tokenizer_class") and model_type.removeprefix("llava_") in ("llama", "mistral", "mixtral"):
        # The class and defaults of LLaVA's AutoTokenizer.
        config = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", **config}
        config["tokenizer_class"] = "LlamaTokenizer"
    backend = _llama_backend(path, config)
    if backend is None:
        if not config and not any(find_file(path, name) for name in TOKENIZER_FILES):
            raise FileNotFoundError(f"{path} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}.")
        about = {"trust_remote_code": trust_remote_code}
        if model_type.startswith("llava_") and model_type not in CONFIG_MAPPING:
            # transformers does not know LLaVA's layout, and fails on Llama 3's RoPE scaling in it.
            about["config"] = PreTrainedConfig()
        with foreign_code_refused(path):
            tokenizer = AutoTokenizer.from_pretrained(path, **about)
        own_code = trust_remote_code and "auto_map" in config  # which may differ from the file on purpose
        file = None if own_code else find_file(path, "tokenizer.json")
        if file and tokenizer.is_fast and _splits(tokenizer.backend_tokenizer) != _splits(Tokenizer.from_file(file)):
            # transformers 5 rebuilds it as the class in its config, or of the model's type, has it: SmolLM2's and
            # Granite's (GPT2Tokenizer) then keep the digits of a number together that they were trained to split.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        if tokenizer.init_kwargs.pop(BOS_IN_TEMPLATE, False):
            _add_to_every_text(tokenizer.backend_tokenizer, [tokenizer.bos_token], [])
        return tokenizer

    # The pipeline is in tokenizer.json; the rest of the configuration is kept.
    config = {**read_json(path, "special_tokens_map.json"), **config, "tokenizer_class": "PreTrainedTokenizerFast"}
    for key in (
        *("auto_map", "legacy", "sp_model_kwargs", "add_prefix_space", "use_default_system_prompt"),
        *("add_bos_token", "add_eos_token", "added_tokens_decoder"),
    ):
        config.pop(key, None)
    for key in ("unk_token", "bos_token", "eos_token", "pad_token"):
        if isinstance(config.get(key), dict):
            config[key] = config[key]["content"]
    if backend.token_to_id(IMAGE_MARK) is None:  # removed: the configuration would add it again
        for key in ("image_token", "extra_special_tokens", "additional_special_tokens"):
            if IMAGE_MARK in str(config.get(key)):
                del config[key]
                config["pad_token"] = config.get("unk_token")  # as in LLaVA's own
    if chat_template := find_file(path, "chat_template.jinja"):
        config["chat_template"] = Path(chat_template).read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=str(path), **config)


def image_token_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy with `<image>` as one token, for processors that tokenize the whole text at once.

    It gives the ids that `tokenize` makes of the texts between images: after a run of `<image>` a Llama tokenizer
    puts its blank, as before a new text. This survives `save_pretrained`. A tokenizer that has `<image>` is returned
    unchanged.
    """
    if IMAGE_MARK in tokenizer.get_vocab():
        return tokenizer
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if _prepend_scheme(json.loads(backend.to_str())) != "first":
        with_image = copy.deepcopy(tokenizer)
        with_image.add_tokens([AddedToken(IMAGE_MARK, normalized=False, special=True)])
        return with_image

    # The pre-tokenizer puts its blank at offset 0 only. The normalizer sees what follows an image, if the mark is
    # looked for after it has run: hence normalized=True.
    after_image = normalizers.Replace(Regex(f"{IMAGE_MARK}(?!{IMAGE_MARK})(?=[\\s\\S])"), IMAGE_MARK + _BLANK)
    backend.normalizer = normalizers.Sequence(
        [backend.normalizer, after_image] if backend.normalizer else [after_image]
    )
    backend.add_special_tokens([AddedToken(IMAGE_MARK, normalized=True, special=True)])
    settings = {key: value for key, value in tokenizer.init_kwargs.items() if key != "tokenizer_object"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def leave_bos_to_the_template(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str | None:
    """Let a tokenizer add nothing to a text; return what the chat template is to write first, BOS or "".

    transformers' processors tokenize what a template has written with special tokens, vLLM and OpenVINO without: now
    both give the training's ids. `prompt` is a text of the template. A Llama tokenizer that writes its blank at offset
    0 only gets it behind BOS. None, and the tokenizer unchanged, if it adds nothing or BOS as text has other ids.
    `load_tokenizer` lets the tokenizer add BOS again, by the key BOS_IN_TEMPLATE.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    if tokenizer("").input_ids[:1] != [tokenizer.bos_token_id]:
        return None
    bos, begin = tokenizer.bos_token, ""
    if not prompt.startswith(bos):
        expected = [tokenizer.bos_token_id, *ids(prompt)]
        begin = next((text for text in (bos, bos + " ") if ids(text + prompt) == expected), None)
    if begin is not None:
        _add_to_every_text(tokenizer.backend_tokenizer, [], [])
    return begin


def slow_llama_config(tokenizer: PreTrainedTokenizerBase) -> dict | None:
    """Return the `tokenizer_config.json` for transformers 4's slow Llama class, or None for other tokenizers.

    With it that class, LLaVA's, gives the same ids from `tokenizer.model`. `<image>`, which LLaVA replaces before it
    tokenizes, is left out. Special tokens are listed by name: before a text that begins with an added token that is
    not listed, such as `<im_end>` after an image, the slow class writes a blank. Tokens that are not special, which
    decoding keeps, cannot be listed.
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
        "add_bos_token": tokenizer("").input_ids[:1] == [tokenizer.bos_token_id],
        "add_eos_token": False,
        "added_tokens_decoder": added,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "sp_model_kwargs": {},
    }


def _image_tokens(added: dict[int, dict]) -> set[int]:
    """Return the ids of `<image>` and of the padding token that transformers' LLaVA models have after it.

    LLaVA's own tokenizers have neither, and tokenize a text that spells them like any other.
    """
    image = next((index for index, token in added.items() if token["content"] == IMAGE_MARK), None)
    if image is None:
        return set()
    behind = {index for index in added if index >= image}
    return behind if {added[index]["content"] for index in behind} <= {IMAGE_MARK, "<pad>"} else set()


def _llama_backend(path: str | os.PathLike, config: dict) -> Tokenizer | None:
    """Return the exact pipeline of a Llama tokenizer (BPE with blanks written as U+2581), or None for any other.

    A tokenizer.json of that class with another kind of model (unigram, or with a normalizer of its own) is returned
    unchanged: transformers 5 would rebuild it as a BPE without a normalizer.
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
            token["normalized"] &= scheme is None  # the slow class looks for them in the text before normalization
        backend = Tokenizer.from_str(json.dumps(pipeline))
        marks = pre_tokenizers.Split(Regex(marks["pattern"]["Regex"]), "isolated") if marks else None
    elif model_file:
        backend, asks_for_blank = _read_sentencepiece(model_file)
        scheme, marks = "always" if asks_for_blank else "never", backend.pre_tokenizer
    else:
        return None

    if scheme is not None:
        # With `legacy`, its default, the slow class takes the blank from the file; otherwise it writes one itself.
        if config.get("legacy") is False and (scheme != "never" or not tokenizer_file):
            scheme = "first"
        elif config.get("legacy") and scheme == "first":
            scheme = "always"
        # Two steps, because Metaspace writes no blank before a text that begins with its replacement character. The
        # first step's is the ordinary blank, of which the normalizer has left none.
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


def _splits(backend: Tokenizer) -> list:
    """Return what decides into which pieces a tokenizer cuts a text; the blank in front is the configuration's."""
    steps = [json.loads(step.__getstate__()) if step else None for step in (backend.normalizer, backend.pre_tokenizer)]
    return [type(backend.model), _without_prefix_space(steps)]


def _without_prefix_space(part: object) -> object:
    if isinstance(part, dict):
        return {key: _without_prefix_space(value) for key, value in part.items() if key != "add_prefix_space"}
    return [_without_prefix_space(value) for value in part] if isinstance(part, list) else part


def _add_tokens(backend: Tokenizer, path: str | os.PathLike, config: dict, keep_post_processor: bool) -> None:
    """Add the special and added tokens of a tokenizer's configuration, and its begin and end tokens.

    keep_post_processor: the backend has begin and end tokens; the configuration replaces them only if it names them.
    Raises UserError for an added token whose id is not the next one.
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
            raise UserError(
                f"The tokenizer in {path} gives its added token {token['content']!r} the id {index}, but its "
                f"vocabulary ends before that: the ids of added tokens must follow without a gap."
            )

    if not keep_post_processor or "add_bos_token" in config or "add_eos_token" in config:
        bos, eos = special["bos_token"], special["eos_token"]
        before = [bos] if config.get("add_bos_token", True) and bos else []
        after = [eos] if config.get("add_eos_token", False) and eos else []
        _add_to_every_text(backend, before, after)


def _add_to_every_text(backend: Tokenizer, before: list[str], after: list[str]) -> None:
    """Let a tokenizer add these tokens to each text, and no others."""
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join([*before, "$A", *after]),
        pair=" ".join([*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *after]),
        special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}],
    )


def _prepend_scheme(pipeline: dict) -> str | None:
    """Return where a Llama-style tokenizer.json puts its blank: "first", "always" or "never"; None for other kinds."""
    model, normalizer, pre_tokenizer = pipeline["model"], pipeline.get("normalizer"), pipeline.get("pre_tokenizer")
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    rewrites = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if pre_tokenizer is None:  # the old conversion: normalizers, which run on each text between special tokens
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
    """Return the last step of a pre-tokenizer if it isolates user-defined pieces."""
    last = _steps(pre_tokenizer)[-1] if pre_tokenizer else {}
    return last if last.get("type") == "Split" and last.get("behavior") == "Isolated" else None


def _read_sentencepiece(file: str) -> tuple[Tokenizer, bool]:
    """Build the BPE of a SentencePiece `tokenizer.model`; return whether it puts a blank before a text, too.

    Raises UserError if the file cannot be read or its tokenization cannot be rebuilt exactly.
    """
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except ImportError as error:
        raise UserError(f"{file} needs packages that are missing: pip install sentencepiece protobuf.") from error
    try:
        model = ModelProto.FromString(Path(file).read_bytes())
    except DecodeError:
        model = ModelProto()
    if not (model.pieces and model.HasField("trainer_spec")):  # which stands behind the pieces
        raise UserError(f"{file} is not a SentencePiece model, or only a part of one. Download it again.")

    kind = ModelProto.SentencePiece
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == kind.NORMAL}
    user_defined = [piece.piece for piece in model.pieces if piece.type == kind.USER_DEFINED]
    unknown = next((piece.piece for piece in model.pieces if piece.type == kind.UNKNOWN), None)
    merges = _merges(scores)
    if reason := _why_not_exact(model, scores, merges, user_defined):
        raise UserError(
            f"{file} {reason}, so that ids other than SentencePiece's would come out here. Put a tokenizer.json with "
            f"the ids that the language model was trained with beside it: where there is one, it is what is read."
        )

    vocabulary = {piece.piece: index for index, piece in enumerate(model.pieces)}
    settings = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=bool(user_defined), **settings))
    if user_defined:
        # They are isolated, and an isolated text that is a piece becomes that piece (ignore_merges). So that the name
        # of a control or byte piece, spelled in a text between two of them, does not, it is split.
        patterns = [re.escape(mark) for mark in sorted(user_defined, key=len, reverse=True)]
        names = vocabulary.keys() - scores.keys() - set(user_defined)
        patterns += [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in sorted(names)]
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(patterns)), "isolated")
    return backend, model.normalizer_spec.add_dummy_prefix


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return the merges of a SentencePiece BPE in their order.

    SentencePiece joins the pair whose joined piece has the highest score, and of equal ones the leftmost. Ids say
    nothing about it: Llama 2 has runs of blanks at ids from 259 on with scores of -1e9. Where all have one score, the
    leftmost pair is the one with the longest left half.
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
    """Return what the tokenizers library cannot do as SentencePiece does it, or None."""
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
    # Among pairs of equal score SentencePiece goes by position, and here the order of the merges decides. The result is
    # the same if they share no half and none becomes a half of an earlier merge, and for runs of one character.
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
