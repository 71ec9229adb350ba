"""The benchmark of evaluations compares two trees; here this one with itself, on a tiny model."""

import re

import pytest

from benchmarks import evaluation, random_setup
from tests.launching import ROOT


@pytest.mark.slow
def test_a_tree_compared_with_itself_answers_the_same(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    random_setup.make_models(tmp_path, "tiny", layers=2)
    random_setup.make_records(tmp_path, count=12, pictures=3)
    own = ["--tree", str(ROOT), "--setup", str(tmp_path), "--rounds", "1", "--questions", "6"]
    evaluation.main([*own, "--bf16", "False", "--dataloader_num_workers", "1"])
    printed = capsys.readouterr().out
    assert "6 held-out questions" in printed and "; 6 of 6 answers are the same." in printed
    found = re.findall(r"^\| ([a-z ]*) \| (here|there) \| ([\d.]+) \|", printed, re.MULTILINE)
    rows = [(name, side) for name in evaluation.MOMENTS for side in ("there", "here")]
    assert [row[:2] for row in found] == rows
    assert all(float(rate) > 0 for _, _, rate in found) and printed.count("| | ratio | **") == 2
