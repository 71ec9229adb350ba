"""Whether the answer to a held-out question is right: by exact match, or by the letter that it chooses.

A record may name its metric under the key `metric`; the default is exact match. Choices are read as LLaVA's
`llava/eval/eval_science_qa.py` reads them, so that figures compare with those published for ScienceQA.
"""

import re

from ..data.templates import BadRecord
from ..data.tokenization import shorten

EXACT_MATCH, CHOICE = "exact_match", "choice"
_LETTERS = "ABCDE"  # of ScienceQA's questions, which have five options at most


def metric_of(record: dict) -> str:
    """Return how the answer to a record's last question is scored.

    Raises BadRecord for an unknown metric, and for a choice whose expected answer names no letter.
    """
    metric = record.get("metric", EXACT_MATCH)
    if metric not in (EXACT_MATCH, CHOICE):
        raise BadRecord(f"its 'metric' is {shorten(metric)}; known are {EXACT_MATCH!r} (the default) and {CHOICE!r}.")
    answer = record["conversations"][-1]["value"]
    if metric == CHOICE and chosen_letter(answer) is None:
        raise BadRecord(
            f"its 'metric' is {CHOICE!r}, but its answer {shorten(answer)} names no letter; expected 'B', 'B. text' or "
            "'... The answer is B.'"
        )
    return metric


def is_right(metric: str, answer: str, expected: str) -> bool:
    """Return whether an answer is right. Blanks around it do not count; naming no letter, or several, is wrong."""
    if metric == CHOICE:
        return chosen_letter(answer) == chosen_letter(expected)
    return answer.strip() == expected.strip()


def chosen_letter(answer: str) -> str | None:
    """Return the letter of an answer that is only a letter, begins with `B. `, or says `The answer is B.` once."""
    answer = answer.strip()
    if answer[:1] and answer[0] in _LETTERS and (len(answer) == 1 or answer[1:3] == ". "):
        return answer[0]
    said = re.findall(r"The answer is ([A-Z]).", answer)  # followed by any one character, as in LLaVA
    return said[0] if len(said) == 1 else None
