"""A run that is killed ends like one that is not, wherever the kill falls: a small selection of crash_loop.py's.

The runs are train.py's own on tiny models; kills, comparison and what is compared are described there.
"""

import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.end_to_end import crash_loop
from tests.end_to_end.crash_loop import STEPS, Crashes, Kind, Plan, kills_at_every_operation
from tests.kill_points import IN_A_STATE, Kill

ONE_KEPT = Kind(None, 1, save_steps=1, save_total_limit=1)
ALL_KEPT = Kind(None, 1, save_steps=2, save_total_limit=None)
ZERO3 = Kind("zero3", 2, save_steps=1, save_total_limit=1)
EVALUATED = Kind(None, 1, save_steps=2, save_total_limit=1, workers=2, evaluated=True)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def crashes(tmp_path_factory) -> Crashes:
    """Uninterrupted runs, for their operations and results."""
    crashes = Crashes(tmp_path_factory.mktemp("crashes"), random.Random(0))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(crashes.train_uninterrupted, (ZERO3, ONE_KEPT, ALL_KEPT)))
    return crashes


@pytest.fixture(scope="module")
def outcomes(crashes):
    """`outcomes(name)`: what became of the runs with these kills; all are computed ahead, two at a time."""
    names = crashes.operations[ONE_KEPT][0]
    in_saves = [position for position, name in enumerate(names) if name.startswith("save")]
    only_at_the_end = [name for name in names[in_saves[-1] + 1 :] if name not in names[: in_saves[-1]]]
    model = next(name for name in only_at_the_end if "write" in name and name.endswith(".safetensors"))
    of_removal = set(names) - set(crashes.operations[ALL_KEPT][0])
    behind = [kill for _, kill in kills_at_every_operation(crashes, (ONE_KEPT,), "behind")]
    removal = [replace(kill, occurrence=1) for kill in behind if kill.operation in of_removal]
    lot = crashes.random
    of_a_state = {
        kind: next(name for name in crashes.operations[kind][kind.processes - 1] if name.startswith("behind: write "))
        for kind in (ONE_KEPT, ZERO3)
    }
    planned = {
        # A run may come to none of those drawn by lot: an instant after its end, the save of a step that it has done.
        "two processes": [
            (ZERO3, [lot.choice(kills_at_every_operation(crashes, (ZERO3,), "behind"))[1]]),
            *Plan(crashes, (ZERO3,)).runs(2),
        ],
        "one process": Plan(crashes, (ONE_KEPT, ALL_KEPT)).runs(7),
        "first save": [(ONE_KEPT, [Kill(0, names[in_saves[0]]), Kill(0, "behind: rename .checkpoint-#.incomplete")])],
        "result": [
            (ONE_KEPT, [Kill(0, model, written=0.5), *(Kill(0, name) for name in lot.sample(only_at_the_end, 2))])
        ],
        "behind": [
            (kind, [Kill(kind.processes - 1, of_a_state[kind], occurrence=2, written=0.5, alone=True)])
            for kind in (ONE_KEPT, ZERO3)
        ],
        "removal": [(ONE_KEPT, [kill]) for kill in lot.sample(removal, 2)],
    }
    with ThreadPoolExecutor(2) as pool:
        futures = {name: [pool.submit(crashes.crash, *run) for run in runs] for name, runs in planned.items()}
        yield lambda name: [future.result() for future in futures[name]]


@pytest.mark.parametrize("where", ["one process", "two processes"])
def test_a_run_killed_at_places_drawn_by_lot_ends_as_if_it_had_not_been(where, outcomes):
    assert [str(outcome) for outcome in outcomes(where) if outcome.fault] == []
    assert any(outcome.stops for outcome in outcomes(where)), "none of the kills happened"


def test_killed_in_its_first_save_again_and_again_a_run_starts_anew_each_time(outcomes):
    [outcome] = outcomes("first save")
    assert not outcome.fault and outcome.resumed_from == [0, 0], outcome


def test_killed_while_the_result_is_written_only_the_result_is_written_again(outcomes):
    [outcome] = outcomes("result")
    assert not outcome.fault and outcome.resumed_from == [STEPS] * 3, outcome


def test_killed_in_the_middle_of_a_file_that_is_written_behind_the_steps_a_run_goes_on_from_the_state_before(outcomes):
    for outcome in outcomes("behind"):
        assert not outcome.fault and outcome.resumed_from == [1], outcome


def test_killed_while_an_old_checkpoint_is_removed_a_run_goes_on_from_the_new_one(outcomes):
    for outcome in outcomes("removal"):
        assert not outcome.fault and outcome.resumed_from == [2], outcome  # the first to be removed is that of step 1


@pytest.mark.parametrize("kind", [ONE_KEPT, ZERO3], ids=str)
def test_everything_in_a_checkpoint_is_flushed_to_the_disk_before_it_gets_its_name(kind, crashes):
    # A kill leaves the page cache alone, so no crash above would show a missing flush; a power failure would.
    for names in crashes.operations[kind].values():
        unflushed = set()
        for moment, what, path in (name.replace(": ", " ").split(" ", 2) for name in names):
            if moment not in IN_A_STATE:
                continue
            if what == "write":
                unflushed.add(path)
            elif what == "fsync":
                unflushed.discard(path)
            elif what == "rename" and path == ".checkpoint-#.incomplete":
                assert unflushed == set()
        assert unflushed == set()  # also of the other ranks, which rename nothing
    [in_order] = [names for rank, names in crashes.operations[kind].items() if rank == 0]
    in_order = [name.split(": ") for name in in_order if name.startswith(IN_A_STATE)]
    renames = [position for position, (_, what) in enumerate(in_order) if what == "rename .checkpoint-#.incomplete"]
    assert [in_order[position][0] for position in renames] == ["behind"] * (STEPS - 1) + ["save"]
    for position in renames:  # the entries of the checkpoint, and afterwards its own
        assert in_order[position - 1][1] == "fsync .checkpoint-#.incomplete"
        assert in_order[position + 1][1] == "fsync ."


def test_readmes_command_says_that_all_runs_ended_as_if_nobody_had_killed_them(monkeypatch, tmp_path, capsys):
    for groups, kind in ((crash_loop.GROUPS, ALL_KEPT), (crash_loop.SIGNALLED, EVALUATED)):  # a run of each to compare
        monkeypatch.setitem(groups, "one", (kind,))
    monkeypatch.setattr(sys, "argv", ["crash_loop.py", "--kills", "1", "--signals", "1", "--only", "one"])
    monkeypatch.chdir(tmp_path)  # it changes to the repository itself
    code, printed = crash_loop.main(), capsys.readouterr().out
    assert code == 0, printed
    assert re.search(r"^(\d+) of \1 runs ended as if nobody had killed them; ", printed, re.MULTILINE), printed
