"""A loss or a gradient that is not finite takes no optimizer step, on any backend, whichever rank it comes from."""

import json

import pytest

from tests.forked_runs import start

BACKENDS = {None: 1, "cpu": 2, "zero2": 2, "zero3": 2}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_is_not_finite_is_not_taken_on_any_rank(backend, tmp_path):
    program = "tests/training/not_finite_steps.py"
    run = start([str(tmp_path)], tmp_path / "printed.txt", backend, BACKENDS[backend], program=program)
    assert run.wait() == 0, run.text
    assert backend is None or {"cpu": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}[backend] in run.text
    for rank in range(BACKENDS[backend]):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        first, *bad, again = found.values()
        assert first["finite"] and again["finite"]
        # Adam's first step is one learning rate long, and the same for every later one while the gradient is the same.
        assert first["weight"] == pytest.approx([0.5 - 0.005] * 4, abs=1e-6)
        assert [step["finite"] for step in bad] == [False] * 4
        assert [step["weight"] for step in bad] == [first["weight"]] * 4
        assert again["weight"] != first["weight"] and max(map(abs, again["weight"])) < 1
