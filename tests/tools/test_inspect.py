"""inspect takes the flags of train.py and shows what they will train."""

import json

import pytest

from mini_llava.tools import inspect
from tests.end_to_end.runs import FIXTURES, flags_of
from tests.launching import ROOT


def shown(capsys, *flags) -> str:
    assert inspect.main([*flags_of(2, "unused", {}), *flags]) == 0
    return capsys.readouterr().out


@pytest.fixture
def record():
    """The first record with an image, and its place."""
    records = json.loads((FIXTURES / "data" / "train_stage2.json").read_text(encoding="utf-8"))
    return next((number, each) for number, each in enumerate(records) if "image" in each)


def test_a_record_is_shown_with_its_answers_marked_and_its_image_folded(capsys, record):
    number, content = record
    text = shown(capsys, "--record", str(number))
    assert f"record {number} " in text and "16 of images" in text and text.count("<image x16>") == 1
    answers = [turn["value"].strip() for turn in content["conversations"] if turn["from"] == "gpt"]
    marked = [part.split("]]")[0] for part in text.split("[[")[2:]]  # the first is the legend
    assert len(marked) == len(answers)
    for part, answer in zip(marked, answers, strict=True):
        assert answer in part.replace("↵", "") and part.endswith("</s>")


def test_colours_are_for_terminals_and_for_those_who_ask(capsys):
    assert "\033[" not in shown(capsys)
    in_colour = shown(capsys, "--color", "always", "--samples", "1")
    assert "\033[1;32m" in in_colour and "[[" not in in_colour


def test_the_first_records_are_shown_and_what_cannot_be_trained_on_says_why(capsys, tmp_path):
    bad = [{"id": "torn", "conversations": [{"from": "human", "value": "Hm?"}]}]
    good = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "\033[2Jgone\n"}]}
    (tmp_path / "data.json").write_text(json.dumps([*bad, good, good]))
    text = shown(capsys, "--data_path", str(tmp_path / "data.json"), "--samples", "2")
    assert "record 0 (id torn): cannot be trained on: " in text
    assert "record 1" in text and "record 2" not in text
    assert "\\x1b[2Jgone" in text and "\033" not in text, "data must not steer the terminal"


def test_a_record_that_is_not_there_is_a_sentence(capsys):
    assert inspect.main([*flags_of(2, "unused", {}), "--record", "99999"]) == 2
    assert "--record 99999: the data have 80 records, " in capsys.readouterr().err


def test_without_flags_it_shows_the_embedded_demo(capsys, tmp_path, monkeypatch):
    (tmp_path / "mini_llava").symlink_to(ROOT / "mini_llava")
    monkeypatch.chdir(tmp_path)
    assert inspect.main([]) == 0
    text = capsys.readouterr().out
    assert "4,800 records, template v1" in text and text.count("[[") > 3
