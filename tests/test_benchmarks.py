"""The benchmarks run: on tiny models here, as they do on real shapes."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import consumers, random_setup
from tests import forked_runs
from tests.launching import CONFIGS


def printed_by(benchmark: str, words: list, folder: Path, seconds: float = 300) -> str:
    run = forked_runs.start(list(map(str, words)), folder / "printed.txt", program=f"benchmarks/{benchmark}")
    assert run.wait(seconds) == 0, run.text[-5000:]
    return run.text


@pytest.mark.slow
def test_throughput_measures_the_real_trainer_and_prints_a_row(tmp_path):
    random_setup.make_models(tmp_path, "tiny")
    random_setup.make_records(tmp_path, count=24, pictures=3)
    for records in ("stage1.json", "stage2.json"):
        assert len(json.loads((tmp_path / records).read_text())) == 24

    table = tmp_path / "table.jsonl"
    own = ["--setup", tmp_path, "--name", "tiny", "--steps", "3", "--warmup_steps", "1", "--table", table]
    of_train = ["--stage", "2", "--bf16", "False", "--global_batch_size", "4", "--dataloader_num_workers", "0"]
    printed = printed_by("throughput.py", [*own, *of_train], tmp_path)

    row = json.loads(table.read_text())
    assert (row["name"], row["steps"]) == ("tiny", 2)
    assert row["samples"] > 0 and row["tokens"] == row["computed"] > 0  # packed: nothing is padded
    assert "| tiny |" in printed
    assert not list(tmp_path.glob("output/*.safetensors"))  # no weights are left


@pytest.mark.slow
def test_memory_estimates_without_a_gpu_and_prints_a_row(tmp_path):
    random_setup.make_models(tmp_path, "tiny")
    random_setup.make_records(tmp_path, count=24, pictures=1)
    for weights in tmp_path.glob("*/*.safetensors"):
        weights.unlink()
    own = ["--setup", tmp_path, "--name", "tiny", "--table", tmp_path / "table.jsonl"]
    zero3 = ["--accelerate_config", CONFIGS / "zero3.yaml", "--num_gpus", "4"]
    printed = printed_by("memory.py", [*own, "--only_estimate", "--stage", "2", *zero3], tmp_path)
    assert "4 GPUs of 79 GiB, ZeRO-3, bf16" in printed and "It fits: " in printed

    row = json.loads((tmp_path / "table.jsonl").read_text())
    assert row["estimate"] == pytest.approx(sum(row["parts"].values()), abs=0.1) and "measured" not in row
    assert f"| tiny | {row['estimate']} | - | - |" in printed


@pytest.mark.slow
def test_training_states_are_written_while_the_run_stands_behind_its_steps_and_by_deepspeed(tmp_path):
    flags = ["--directory", str(tmp_path / "states"), "--layers", "2", "--width", "32", "--times", "1"]
    run = forked_runs.start(flags, tmp_path / "printed.txt", "zero3", 2, program="benchmarks/checkpoints.py")
    assert run.wait() == 0, run.text[-5000:]
    for way in ("standing", "behind", "deepspeeds"):
        assert re.search(rf"^{way}: 0.000 GB in \d+\.\d\d s", run.text, re.MULTILINE), run.text
    assert re.search(
        r"^2 processes, DeepSpeed ZeRO-3.* behind the steps a save stops the run for", run.text, re.MULTILINE
    )
    assert not list((tmp_path / "states").iterdir())


def test_a_tool_that_cannot_be_run_says_where_its_words_are(tmp_path):
    with pytest.raises(RuntimeError, match=r"ended with 3, see .*tool\.txt"):
        consumers.run_into(tmp_path / "tool.txt", [sys.executable, "-c", "print('why'); raise SystemExit(3)"])
    assert (tmp_path / "tool.txt").read_text() == "why\n"


@pytest.mark.slow
def test_consumers_trains_what_it_gives_away_and_compares_answers_with_the_chat(tmp_path):
    printed = printed_by(
        "consumers.py", ["--directory", tmp_path, "--questions", 4, "--steps", 6, "--only"], tmp_path, 900
    )
    assert re.search(r"^\| our chat, adapters \|.*\| \d of 4 \|", printed, re.MULTILINE)
    assert printed.count("| not run |") == len(consumers.ROWS)

    # Two of its tools are here, without an environment of their own.
    for name in ("transformers' processor", "PEFT, adapters"):
        _, tool, result = consumers.ROWS[name]
        words = [tool, "--model", tmp_path / result, "--adapter", tmp_path / result / "adapter"]
        words += ["--questions", tmp_path / "questions.json", "--answers", tmp_path / f"{name}.jsonl"]
        printed_by("consumer.py", words, tmp_path)
    rows = {row.split("|")[1].strip(): row for row in consumers.table(tmp_path)}
    assert "| 4 of 4 |" in rows["transformers' processor"]
    assert "tokenizer alone, with special tokens and without: 4 of 4" in rows["transformers' processor"]
    assert "| 4 of 4 | 4 of 4 |" in rows["PEFT, adapters"]  # ids, and answers
    assert re.search(r"answers unlike the base's: [1-4] of 4", rows["PEFT, adapters"])
