#!/usr/bin/env bash
# transformers 5.23.0 reads a Llama `tokenizer.model` with its merges in the order of the ids; SentencePiece joins by
# score. Where the two orders differ the ids differ, silently.
#
# Llama 2's own file is such a one: its runs of blanks have ids from 259 on and the score -1e9, so that they are joined
# last. Read from a folder that has `tokenizer.model` alone, as many published models do, two blanks are joined first:
# indented code and double blanks get other ids than the model was trained with. Transformers 4's slow class gave
# SentencePiece's. Here a small BPE is trained and its runs of blanks get the score that Llama 2's have.
#
# Seen:
#   one blank: 0 of 1 texts have other ids than SentencePiece's
#   runs of blanks: 222 of 500 texts have other ids than SentencePiece's
#   'def f2(x):  return x + 2'
#   ['▁def', '▁f', '2(', 'x', '):', '▁', '▁return', '▁x', '▁+', '▁2']
#   ['▁def', '▁f', '2(', 'x', '):', '▁▁', 'return', '▁x', '▁+', '▁2']
#
# This script fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 sentencepiece==0.2.3 protobuf==7.36.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import io
import json
from pathlib import Path

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer

lines = [f"def f{n}(x):" + " " * (n % 9) + f"return x + {n}" for n in range(500)]
written = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines), model_writer=written, model_type="bpe", vocab_size=330, byte_fallback=True, minloglevel=2,
    normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
)  # fmt: skip
model = ModelProto.FromString(written.getvalue())
for piece in model.pieces:
    if len(piece.piece) > 1 and set(piece.piece) == {"\u2581"}:
        piece.score = -1e9
Path("llama").mkdir()
Path("llama/tokenizer.model").write_bytes(model.SerializeToString())
Path("llama/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True}))
processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
tokenizer = AutoTokenizer.from_pretrained("llama")
differing = {}
for kind, texts in {"one blank": ["def f7(x): return x"], "runs of blanks": lines}.items():
    pairs = [(processor.encode(text), tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    differing[kind] = sum(theirs != ours for theirs, ours in pairs)
    print(f"{kind}: {differing[kind]} of {len(texts)} texts have other ids than SentencePiece's")
text = next(line for line in lines if processor.encode(line) != tokenizer(line, add_special_tokens=False).input_ids)
print(repr(text), processor.encode(text, out_type=str), tokenizer.tokenize(text), sep="\n")
assert differing["one blank"] == 0 and differing["runs of blanks"] > 0, "the ids are SentencePiece's now"
PYTHON
