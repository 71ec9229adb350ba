"""The tokenizer that LLaVA reads a `tokenizer.model` with, rewritten on SentencePiece itself, and a file for it."""

import json
import re
import shutil
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

FIXTURES = Path(__file__).parent / "parity" / "fixtures"
BLANK = "▁"
Piece = ModelProto.SentencePiece


class SlowLlama:
    """transformers 4.37's `LlamaTokenizer` for a folder with tokenizer.model and tokenizer_config.json."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.legacy = config.get("legacy") is not False
        model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
        model.normalizer_spec.add_dummy_prefix &= self.legacy
        self.processor = SentencePieceProcessor(model_proto=model.SerializeToString())
        names = [config[key] for key in ("unk_token", "bos_token", "eos_token")]
        self.added = {name: {"id": self.processor.piece_to_id(name)} for name in names}
        for index, token in config.get("added_tokens_decoder", {}).items():
            self.added[token["content"]] = {**token, "id": int(index)}
        self.special = {*names, config.get("pad_token"), *config.get("additional_special_tokens", [])}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.unknown = names[0]

    def __call__(self, text: str) -> list[int]:
        """The ids of a text, BOS in front."""
        if not self.legacy and text:
            text = BLANK + text.replace(BLANK, " ")
        parts = self.pattern.split(text)  # every second one is an added token
        for index in range(1, len(parts), 2):
            if self.added[parts[index]].get("rstrip"):
                parts[index + 1] = parts[index + 1].lstrip()
            if self.added[parts[index]].get("lstrip"):
                parts[index - 1] = parts[index - 1].rstrip()
        ids, tokens = [], []
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self.added[part]["id"])
                tokens.append(part)
            elif part:
                pieces = self.pieces(part)
                ids += [self.processor.piece_to_id(piece) for piece in pieces]
                tokens += pieces
        if not self.legacy and len(tokens) > 1 and tokens[0] == BLANK and tokens[1] in self.special:
            ids = ids[1:]
        return [self.processor.bos_id(), *ids]

    def pieces(self, text: str) -> list[str]:
        if self.legacy or not text.startswith((BLANK, " ")):
            return self.processor.encode(text, out_type=str)
        ahead = len(self.processor.encode(self.unknown))
        return self.processor.encode(self.unknown + text, out_type=str)[ahead:]

    def prompt(self, text: str, image: int) -> list[int]:
        """LLaVA's `tokenizer_image_token`: chunk by chunk, one BOS, `image` in between."""
        first, *others = (self(chunk)[1:] for chunk in text.split("<image>"))
        return [self.processor.bos_id(), *first, *(index for chunk in others for index in (image, *chunk))]


def read_model(folder: Path) -> ModelProto:
    return ModelProto.FromString((folder / "tokenizer.model").read_bytes())


def like_llama_2(folder: Path, **config) -> Path:
    """The fixture's tokenizer with Llama 2's runs of 2 to 16 blanks: early ids, and the score -1e9 all of them.

    Only tokenizer.model and tokenizer_config.json, in which `config` is changed.
    """
    shutil.copytree(FIXTURES / "tokenizer_llama", folder)
    (folder / "tokenizer.json").unlink()
    model = read_model(folder)
    pieces = [piece for piece in model.pieces if set(piece.piece) != {BLANK}]
    lengths = [2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15]  # in the order of Llama's ids
    for number, length in enumerate(lengths):
        pieces.insert(259 + 9 * number, Piece(piece=BLANK * length, score=-1e9))
    pieces.append(Piece(piece=BLANK, score=-1e9))
    del model.pieces[:]
    model.pieces.extend(pieces)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    configure(folder, **config)
    return folder


def configure(folder: Path, **changes) -> None:
    """Change keys of a folder's tokenizer_config.json; None removes one."""
    file = folder / "tokenizer_config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")
