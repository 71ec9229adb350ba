"""A loss that is not finite ends the run with a sentence that says where, and costs no step that was taken."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_llava.data.records import RecordStore
from mini_llava.training.lockstep import DataFault
from tests.end_to_end import runs
from tests.forked_runs import start

SETTINGS = {"global_batch_size": 4, "max_steps": 6, "save_steps": 1, "warmup_ratio": 0}


def test_weights_that_explode_end_the_run_before_they_are_stepped_again(tmp_path):
    values = {"learning_rate": 1e30, "warmup_ratio": 0.5, "save_steps": 1, "save_total_limit": 1}
    flags = runs.flags_of(2, tmp_path, SETTINGS | values)
    with pytest.raises(DataFault, match=r"^Step 3 was not taken: its loss is (nan|inf)\. The state before it is kept"):
        runs.train_here(flags)
    assert len(runs.log(tmp_path)) == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_steps_before_it_are_saved_and_no_older_state_is_removed_for_that(tmp_path):
    values = SETTINGS | {"lr_scheduler_type": "constant", "save_total_limit": 1}
    runs.train_here(runs.flags_of(2, tmp_path, values | {"max_steps": 1, "learning_rate": 1e-4}))
    more = {"save_steps": 50, "resume_from_checkpoint": "latest", "resume_ignore": ["max_steps", "learning_rate"]}
    with pytest.raises(DataFault, match=r"^Step 3 was not taken"):
        runs.train_here(runs.flags_of(2, tmp_path, values | more | {"learning_rate": 1e30}))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_weight_that_is_infinite_ends_the_run_at_its_step_however_rarely_it_is_logged(tmp_path, logging_steps):
    shutil.copytree(runs.FIXTURES / "llm", tmp_path / "llm")
    weights = load_file(tmp_path / "llm" / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = torch.inf
    save_file(weights, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    values = {"model_name_or_path": tmp_path / "llm", "logging_steps": logging_steps, "save_strategy": "no"}
    with pytest.raises(DataFault, match=r"^Step 1 was not taken: its loss is nan"):
        runs.train_here(runs.flags_of(1, tmp_path / "run", SETTINGS | values))
    assert not (tmp_path / "run" / "log.jsonl").exists() and not (tmp_path / "run" / "mm_projector.bin").exists()


@pytest.mark.slow
def test_on_two_processes_both_stop_and_one_names_the_records_of_both(tmp_path):
    flags = runs.flags_of(2, tmp_path / "run", SETTINGS | {"learning_rate": 1e30})
    run = start(flags, tmp_path / "printed.txt", "zero3", 2)
    assert run.wait() != 0
    [sentence] = [line for line in run.text.splitlines() if "Step 2 was not taken" in line]
    assert "Traceback" not in run.text
    listed = [json.loads(line) for line in (tmp_path / "run" / "not_finite.jsonl").read_text().splitlines()]
    assert len(listed) == SETTINGS["global_batch_size"] and all(entry["record"] in sentence for entry in listed)
    # It is a list that --exclude takes: the run without them goes past that step's records.
    store = RecordStore([runs.FIXTURES / "data" / "train_stage2.json"], exclude=[tmp_path / "run" / "not_finite.jsonl"])
    assert len(store) == len(runs.RECORDS) - len(listed)
