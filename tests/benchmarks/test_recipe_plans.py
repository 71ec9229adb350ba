"""The table of hours and memory is what `benchmarks/recipe_plans.py` computes."""

import re

import pytest

from benchmarks import recipe_plans
from tests.readme import PAGES


def in_readme() -> list[list[str]]:
    """The cells of the rows that a recipe and its GPUs begin."""
    rows = re.findall(r"^\| `[\w.-]+` \| \d+ [A-Z]\w+ \|.*", PAGES, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_readme_has_a_row_for_every_plan():
    planned = [(f"`{plan.recipe}`", f"{plan.gpus} {plan.gpu}", plan.config) for plan in recipe_plans.PLANS]
    assert [tuple(row[:3]) for row in in_readme()] == planned


@pytest.mark.slow
def test_a_row_is_what_the_plan_comes_to(tmp_path, monkeypatch, capsys):
    """Of fewer records, which have about the same lengths."""
    monkeypatch.setattr(recipe_plans, "EPOCHS", {stage: epochs * 10 for stage, epochs in recipe_plans.EPOCHS.items()})
    monkeypatch.setattr(recipe_plans, "RECORDS", recipe_plans.RECORDS // 10)
    number = next(n for n, plan in enumerate(recipe_plans.PLANS) if plan[:2] == ("llava-1.5-7b-finetune", 2))
    monkeypatch.setattr(recipe_plans, "PLANS", recipe_plans.PLANS[number : number + 1])
    monkeypatch.setattr("sys.argv", ["recipe_plans.py", "--directory", str(tmp_path)])
    recipe_plans.main()
    row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].strip("|").split("|")]
    readmes = in_readme()[number]
    assert row[:5] == readmes[:5]
    for cell in (5, 7):  # GiB, hours
        mine, theirs = (float(re.match(r"[\d.]+", values[cell])[0]) for values in (row, readmes))
        assert mine == pytest.approx(theirs, rel=0.1)
