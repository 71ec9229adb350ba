"""Answers to held-out questions are scored as their record says, choices as LLaVA's ScienceQA script scores them."""

import pytest

from mini_llava.data.templates import BadRecord
from mini_llava.evaluation.scoring import chosen_letter, is_right, metric_of


def record(answer: str, **more) -> dict:
    return {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": answer}], **more}


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B. a whale", "B"),
        ("Whales breathe air. The answer is B.", "B"),
        ("The answer is B, a whale.", "B"),
        ("The answer is B", None),  # LLaVA's pattern wants a character behind the letter
        ("The answer is B. The answer is C.", None),
        ("B.", None),
        ("B) a whale", None),
        ("b", None),
        ("F", None),  # ScienceQA's questions have five options at most
        ("A whale", None),
        ("BC", None),
        ("", None),
    ],
)
def test_the_letter_of_an_answer_is_the_one_that_llava_reads(answer, letter):
    assert chosen_letter(answer) == letter


def test_an_answer_without_a_letter_is_wrong_and_no_error():
    assert is_right("choice", "The answer is C.", "C") and not is_right("choice", "C", "B")
    assert not is_right("choice", "I do not know", "B")


def test_without_a_metric_an_answer_has_to_match_but_for_the_blanks_around_it():
    assert metric_of(record("a whale")) == "exact_match"
    assert is_right("exact_match", "a whale", " a whale\n") and not is_right("exact_match", "A whale", "a whale")


@pytest.mark.parametrize(
    "bad, sentence",
    [
        (record("B", metric="bleu"), r"its 'metric' is 'bleu'; known are 'exact_match' \(the default\) and 'choice'\."),
        (record("B", metric=["choice"]), r"its 'metric' is \['choice'\]; known are"),
        (record("a whale", metric="choice"), "its answer 'a whale' names no letter; expected 'B', 'B. text' or"),
    ],
)
def test_a_record_that_cannot_be_scored_is_refused_with_a_sentence(bad, sentence):
    with pytest.raises(BadRecord, match=sentence):
        metric_of(bad)
