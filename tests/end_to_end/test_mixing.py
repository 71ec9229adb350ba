"""Several data files: weighted, told apart in the log, and resumed, by whole runs of `train.py`.

The two files are the 80 records of stage 2, cut at different places. Learning rates are real, so that a record more or
less changes every later loss.
"""

import json
import shutil

import pytest
import yaml

from mini_llava.training.checkpoint import CheckpointError
from tests.end_to_end import runs
from tests.end_to_end.runs import RECORDS

pytestmark = pytest.mark.slow

STEPS, SAVED = 14, 9  # an epoch of the weighted files is 8 steps
SETTINGS = {
    "learning_rate": 1e-3,
    "global_batch_size": 8,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_steps": SAVED,
    "max_steps": STEPS,
}


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """`train(name, files, **flags)`: the output directory of a run on these parts of the records."""
    folder = tmp_path_factory.mktemp("mixing")

    def run(name, files, **others):
        paths = []
        for stem, records in files.items():
            paths.append(folder / f"{stem}.json")
            paths[-1].write_text(json.dumps(records))
        values = runs.MODEL_AND_DATA | SETTINGS | others
        values |= {"data_path": [str(path) for path in paths], "model_name_or_path": str(values["model_name_or_path"])}
        values |= {"image_folder": [str(values["image_folder"])] * len(paths)}
        values |= {"vision_tower": str(values["vision_tower"]), "output_dir": str(folder / name)}
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(values))
        runs.train_here(["--stage", "2", "--config", str(config)])
        return folder / name

    return run


TWO = {"first": RECORDS[:50], "second": RECORDS[50:]}
WEIGHTS = [0.5, 1.2]  # 25 + 36 records an epoch


@pytest.fixture(scope="module")
def weighted(train):
    return train("weighted", TWO, data_weights=WEIGHTS)


def test_telling_the_files_apart_changes_no_bit_of_the_training(train):
    one = runs.log(train("one", {"all": RECORDS}, max_steps=4))
    two = runs.log(train("two", TWO, max_steps=4))
    ones = runs.log(train("ones", TWO, max_steps=4, data_weights=[1, 1]))
    for key in ("loss", "gradient_norm"):
        assert [line[key] for line in one] == [line[key] for line in two] == [line[key] for line in ones]
    assert "loss/all" not in one[0] and {"loss/first", "loss/second"} <= set.union(*map(set, two))


def test_the_loss_is_the_mean_of_the_losses_of_files_and_modalities(weighted):
    """Weighted by trained tokens: so it lies between them, and is that of the only one where there is one."""
    seen = set()
    for line in runs.log(weighted):
        for names in (("loss/first", "loss/second"), ("loss_by_modality/text", "loss_by_modality/image")):
            parts = [line[name] for name in names if name in line]
            seen.add(len(parts))
            # The loss is added up in fp32, its parts in fp64.
            assert min(parts) * (1 - 1e-6) <= line["loss"] <= max(parts) * (1 + 1e-6)
    assert seen == {1, 2}


def test_an_epoch_is_as_long_as_the_weights_say(weighted):
    epochs = [line["epoch"] for line in runs.log(weighted)]
    assert epochs == pytest.approx([step / 8 for step in range(1, STEPS + 1)])  # 61 records, 8 a step


def test_a_weighted_run_resumes_to_the_last_bit_in_its_second_epoch(train, weighted):
    resumed = weighted.with_name("resumed")
    resumed.mkdir()
    shutil.copytree(weighted / f"checkpoint-{SAVED}", resumed / f"checkpoint-{SAVED}")
    train("resumed", TWO, data_weights=WEIGHTS, resume_from_checkpoint="latest")
    # A step without images or texts has no entry for them, in both.
    keys = ("step", "loss", "gradient_norm", "loss/first", "loss/second", "loss_by_modality/image")
    whole, rest = ([{key: line.get(key) for key in keys} for line in runs.log(run)] for run in (weighted, resumed))
    assert rest == whole[SAVED:]
    assert (weighted / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


def test_a_run_with_other_weights_is_another_run(train, weighted):
    with pytest.raises(CheckpointError, match=r"--data_weights: \[0.5, 1.2\] in the checkpoint, \[0.5, 1.3\] now"):
        train("weighted", TWO, data_weights=[0.5, 1.3], resume_from_checkpoint="latest")
