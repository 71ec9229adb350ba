"""The files that README offers for copying run in an empty folder, with nothing of the project beside them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "mini_llava"
TOKENIZER = PACKAGE.parent / "tests" / "parity" / "fixtures" / "tokenizer_llama"

SAMPLER = """
from sampler import GlobalBatchSampler, deal
lengths, has_image = [10 + n % 7 for n in range(20)], [n % 3 > 0 for n in range(20)]
sampler = GlobalBatchSampler(lengths, has_image, global_batch_size=8)
batches = list(sampler.batches(total_steps=6))
assert sorted(sum(batches[:3], [])) == list(range(20))
for batch in batches:
    dealt = deal(batch, lengths, ranks=2, micro_batches=2, layout="packed")
    assert sorted(sum(sum(dealt, []), [])) == sorted(batch)
"""
TEMPLATES = """
from transformers import AutoTokenizer
from copied.data.templates import get_template
from copied.data.tokenization import tokenize
record = {
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}],
}
tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
sample = tokenize(record, get_template("v1"), tokenizer, tokens_per_image=4, max_length=2048)
trained = sample.input_ids[sample.labels != -100]
assert tokenizer.decode(trained).strip() == "A cat.</s>", tokenizer.decode(trained)
assert (sample.input_ids == -200).sum() == 4 and sample.images == ["a.png"]
"""
TOKENIZERS = """
from copied.formats.tokenizers import image_token_tokenizer, load_tokenizer
tokenizer = load_tokenizer(TOKENIZER)
assert tokenizer("  The ball").input_ids == [1, 476, 301, 520]  # transformers 5 gives 653 for 476
assert image_token_tokenizer(tokenizer).tokenize("a<image>b")[-2:] == ["<image>", "▁b"]
"""
PROJECTOR = """
import torch
from projector import build_projector, load_projector, save_projector
one, two = build_projector("mlp2x_gelu", 6, 8), build_projector("mlp2x_gelu", 6, 8)
save_projector(one, ".")
load_projector(two, ".")
assert torch.equal(one[0].weight, two[0].weight)
"""
OPTIMIZER = """
import torch
from optimizer import build_adamw, parameter_groups, set_learning_rates
model = torch.nn.ModuleDict({"tower": torch.nn.Linear(3, 4), "head": torch.nn.Linear(4, 2)})
groups = parameter_groups(model, 1e-3, 0.1, {"head": 1e-4})
assert {group["name"]: group["weight_decay"] for group in groups} == {
    "tower": 0.1, "tower_no_decay": 0.0, "head": 0.1, "head_no_decay": 0.0
}
optimizer = build_adamw(groups, (0.9, 0.999), 1e-8, fused=False)
set_learning_rates(optimizer, 0.5)
model["head"](model["tower"](torch.ones(1, 3))).sum().backward()
optimizer.step()
assert sorted({group["lr"] for group in optimizer.param_groups}) == [5e-5, 5e-4]
"""
SCHEDULE = """
import sys
from schedule import learning_rate_factor, warmup_steps
assert [learning_rate_factor("cosine", step, 4, warmup_steps(0.25, 4)) for step in (0, 1, 4)] == [0.0, 1.0, 0.0]
assert "torch" not in sys.modules
"""


# Who imports accelerate: some versions of transformers do by themselves.
WATCH_IMPORTS = """
import builtins, os
imported, import_it = [], builtins.__import__
def watched(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__file__") or ""
    if name.split(".")[0] == "accelerate" and os.path.realpath(importer).startswith(os.path.realpath(os.getcwd())):
        imported.append((importer, name))
    return import_it(name, globals, locals, fromlist, level)
builtins.__import__ = watched
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "files, script",
    [
        (["data/sampler.py"], SAMPLER),
        # The second imports the first; they keep their folder.
        (["data/templates.py", "data/tokenization.py"], TEMPLATES),
        (["formats/tokenizers.py", "data/templates.py", "hub.py", "errors.py"], TOKENIZERS),
        (["model/projector.py"], PROJECTOR),
        (["training/optimizer.py"], OPTIMIZER),
        (["training/schedule.py"], SCHEDULE),
    ],
    ids=["sampler", "templates and tokenization", "tokenizers", "projector", "optimizer", "schedule"],
)
def test_it_runs_when_copied_alone_into_an_empty_folder(files, script, tmp_path):
    for file in files:
        place = tmp_path / (Path(file).name if len(files) == 1 else f"copied/{file}")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / file, place)
    (tmp_path / "use.py").write_text(
        f"{WATCH_IMPORTS}TOKENIZER = {str(TOKENIZER)!r}\n{script}\nimport sys\n"
        "foreign = [name for name in sys.modules if name.split('.')[0] in ('mini_llava', 'deepspeed')]\n"
        "assert not foreign + imported, foreign + imported\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
