#!/usr/bin/env bash
# tokenizers 0.23.3 gives added tokens other ids than their tokenizer.json says, silently, if those leave a gap.
#
# A model whose new tokens begin at a round number (a vocabulary padded to a multiple of 64, as many are) has rows of
# embeddings for them there. `Tokenizer.from_str` and `from_file` read the ids, put the tokens right behind the
# vocabulary instead, and say nothing: every such token looks up the row of another. `to_str` then writes the new ids,
# so that a file read and saved no longer shows what it had.
#
# Seen:
#   in the file {'<loc_0>': 64, '<loc_1>': 65}, read {'<loc_0>': 2, '<loc_1>': 3}, saved again {'<loc_0>': 2, '<loc_1>': 3}
#   ids of 'a<loc_1>': [0, 3]
#
# This script fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
import json

from tokenizers import Tokenizer, models

content = json.loads(Tokenizer(models.BPE({"a": 0, "b": 1}, [])).to_str())
flags = dict(special=True, normalized=False, lstrip=False, rstrip=False, single_word=False)
content["added_tokens"] = [dict(id=64 + n, content=f"<loc_{n}>", **flags) for n in range(2)]


def added(file: dict) -> dict[str, int]:
    return {token["content"]: token["id"] for token in file["added_tokens"]}


tokenizer = Tokenizer.from_str(json.dumps(content))
read = {name: tokenizer.token_to_id(name) for name in added(content)}
saved = added(json.loads(tokenizer.to_str()))
print(f"in the file {added(content)}, read {read}, saved again {saved}")
print("ids of 'a<loc_1>':", tokenizer.encode("a<loc_1>").ids)
assert read == saved == {"<loc_0>": 2, "<loc_1>": 3}, "the ids of the file are kept now"
PYTHON
