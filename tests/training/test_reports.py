"""Reports never cost the run: what cannot be written is said once, and a resumed run's reports read as if never cut."""

import contextlib
import json
import os
import resource
import sys
import warnings
from datetime import datetime
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mini_llava import arguments
from mini_llava.data.records import RecordStore
from mini_llava.watch import trackers
from mini_llava.watch.json_lines import append_json_line, append_lines, read_lines
from mini_llava.watch.report import Report, prepare_reports
from mini_llava.watch.skipped import count_skipped, log_skipped
from tests.end_to_end.runs import flags_of
from tests.forked_runs import start


@contextlib.contextmanager
def files_up_to(size: int):
    """The system writes no file of this process beyond this size: like a full disk, it writes what still fits."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def steps(file) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


# --- what cannot be written ------------------------------------------------------------------------------------------


def test_a_line_for_which_there_is_no_room_leaves_nothing_of_itself(tmp_path):
    file = tmp_path / "log.jsonl"
    append_json_line(file, {"step": 1})
    with files_up_to(file.stat().st_size + 5), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (2, 3, 4):
            append_json_line(file, {"step": step})
    assert steps(file) == [1]
    [warning] = caught
    assert str(warning.message) == f"{file} lacks entries; the run goes on (OSError: [Errno 27] File too large)."
    append_json_line(file, {"step": 5})  # there is room again
    assert steps(file) == [1, 5]


def tensorboard(folder, resumed_at=None) -> Accelerator:
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(folder))
    trackers.start(accelerator, {"seed": 1}, resumed_at)
    return accelerator


def curve(folder) -> list[tuple[int, float]]:
    [run] = (folder / "runs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


@pytest.mark.parametrize(
    "version, name",
    [
        ("plain", "caption"),
        ("v0_plain", "caption"),
        ("v1", "answer"),
        ("chat_template", "answer"),
        ("llava_llama_3", "answer"),
    ],
)
def test_the_progress_line_says_what_the_loss_is_of(version, name):
    order = SimpleNamespace(total_steps=1, sampler=SimpleNamespace(step=0))
    arguments = SimpleNamespace(model=SimpleNamespace(version=version))
    report = SimpleNamespace(arguments=arguments, order=order, is_first=False)
    Report.start_progress_line(report)
    assert report.progress.loss == f"{name} loss"


@pytest.mark.parametrize("folder", [".", "2026-01-02_03-04-05_out"])
def test_a_resumed_run_goes_on_in_the_folder_that_was_written_last(folder, tmp_path):
    """Which is `runs` itself for a run that began before runs had folders."""
    files = {"2026-10-25_02-30-00_out": 1000000001, folder: 1000000002, "1767323045.12": 1000000003}
    for name, second in files.items():  # the hour of the first one was summer's, and TensorBoard's own is no run's
        (tmp_path / "runs" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name / f"events.out.tfevents.{second}.host.1.0").touch()
    (tmp_path / "runs" / "2027-01-01_00-00-00_notes").mkdir()
    assert trackers.run_folder(tmp_path, is_resumed=True) == folder
    assert trackers.run_folder(tmp_path, is_resumed=False) not in files


def test_a_run_whose_directory_has_the_longest_name_has_a_folder(tmp_path):
    output_dir = tmp_path / ("é" * 127)
    (output_dir / "runs" / trackers.run_folder(output_dir, is_resumed=False)).mkdir(parents=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer is a thread
def test_tensorboard_without_room_costs_one_warning(tmp_path):
    accelerator = tensorboard(tmp_path)
    trackers.log(accelerator, {"loss": 1.0}, 1)
    [file] = (tmp_path / "runs").glob("*/*")
    with files_up_to(file.stat().st_size + 5), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2, 40):
            trackers.log(accelerator, {"loss": 1.0}, step)
        trackers.end(accelerator)
    [text] = [str(warning.message) for warning in caught if "lacks entries" in str(warning.message)]
    assert text.startswith("tensorboard lacks entries, which log.jsonl has; the run goes on (OSError")
    assert curve(tmp_path) == [(1, 1.0)]


def test_a_tracker_that_cannot_be_started_costs_one_warning(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.warns(UserWarning, match="tensorboard could not be started; log.jsonl has the same values"):
        accelerator = tensorboard(tmp_path)
    trackers.log(accelerator, {"loss": 1.0}, 1)
    trackers.end(accelerator)


@pytest.mark.slow
def test_a_run_none_of_whose_reports_can_be_written_trains_to_its_end(tmp_path):
    """Folders stand where the files should be, and a file where TensorBoard's folder should be."""
    for name in ("log.jsonl", "skipped.jsonl"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / "runs").touch()
    flags = flags_of(1, tmp_path / "run", {"max_steps": 5, "report_to": "tensorboard", "global_batch_size": 4})
    run = start(flags, tmp_path / "printed.txt")
    assert run.wait() == 0, run.text
    assert (tmp_path / "run" / "mm_projector.bin").is_file()
    for file in (
        "log.jsonl lacks entries",
        "log.jsonl holds entries of an earlier",
        "tensorboard could not be started",
    ):
        assert run.text.count(file) == 1, run.text


def test_an_arguments_file_that_cannot_be_written_ends_the_run_before_the_first_step_and_keeps_the_old_one(tmp_path):
    given = arguments.parse_arguments(flags_of(1, tmp_path, {}))
    file = tmp_path / "arguments.yaml"
    arguments.save_arguments(given, file, {})
    old = file.read_text()
    with (
        files_up_to(100),
        pytest.raises(OSError, match=r"arguments\.yaml cannot be written: File too large\. Make room"),
    ):
        arguments.save_arguments(given, file, {"versions": "new"})
    assert file.read_text() == old


# --- after a kill ----------------------------------------------------------------------------------------------------


def log_of(file, *lines) -> None:
    append_lines(file, [{"step": step, "loss": 0.5} for step in lines])


@pytest.mark.parametrize("torn", ["", '{"step": 13, "lo'])
def test_the_log_of_a_resumed_run_ends_at_its_checkpoint_and_says_what_is_done_again(torn, tmp_path):
    log_of(tmp_path / "log.jsonl", *range(1, 13))
    log_of(tmp_path / "eval_samples.jsonl", 0, 0, 8, 8, 12, 12)
    for name in ("log.jsonl", "eval_samples.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write(torn)
    assert prepare_reports(tmp_path, 8) == "The run had reached step 12: 4 of its steps are done again."
    log_of(tmp_path / "log.jsonl", 9)
    assert steps(tmp_path / "log.jsonl") == list(range(1, 10))
    assert steps(tmp_path / "eval_samples.jsonl") == [0, 0, 8, 8]
    assert prepare_reports(tmp_path, 9) is None and steps(tmp_path / "log.jsonl") == list(range(1, 10))


def test_a_single_step_that_is_done_again_is_one(tmp_path):
    log_of(tmp_path / "log.jsonl", 1, 2, 3)
    assert prepare_reports(tmp_path, 2) == "The run had reached step 3: 1 of its steps is done again."


def test_a_torn_last_line_is_cut_off_even_if_no_step_is_done_again(tmp_path):
    log_of(tmp_path / "log.jsonl", 1, 2)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 3')
    assert prepare_reports(tmp_path, 2) is None
    log_of(tmp_path / "log.jsonl", 3)
    assert steps(tmp_path / "log.jsonl") == [1, 2, 3]


def test_a_run_from_the_start_begins_with_empty_reports(tmp_path):
    log_of(tmp_path / "log.jsonl", 1, 2)
    for name in ("skipped.jsonl", "eval_samples.jsonl"):
        (tmp_path / name).touch()
    assert prepare_reports(tmp_path, None) is None
    assert list(tmp_path.iterdir()) == []


def test_the_curves_of_a_resumed_run_do_not_zigzag(tmp_path):
    accelerator = tensorboard(tmp_path)
    for step in range(1, 8):  # the run is killed here, without a word to TensorBoard
        trackers.log(accelerator, {"loss": 1.0}, step)
    # Event files are read in the order of their names, which begin with the second they were made in.
    [file] = (tmp_path / "runs").glob("*/*")
    file.rename(file.with_name("events.out.tfevents.1.first"))
    resumed = tensorboard(tmp_path, resumed_at=4)
    for step in range(5, 9):
        trackers.log(resumed, {"loss": 2.0}, step)
    trackers.end(resumed)
    assert curve(tmp_path) == [(step, 1.0 if step <= 4 else 2.0) for step in range(1, 9)]


def test_tensorboard_tells_runs_apart_by_when_and_where_they_were_started(tmp_path, monkeypatch):
    """A run that starts anew in a directory has a folder of its own there; a resumed one has that of the newest."""
    moments = iter(datetime(2026, 1, day, 12, 30, 5) for day in (9, 10, 11))
    monkeypatch.setattr(trackers, "datetime", SimpleNamespace(now=lambda: next(moments)))
    for folder, resumed_at in (("a", None), ("a", None), ("b", 7), ("a", 7)):  # b: from a checkpoint in another one
        trackers.end(tensorboard(tmp_path / folder, resumed_at))
    names = sorted(str(run.relative_to(tmp_path)) for run in tmp_path.glob("*/runs/*"))
    assert names == ["a/runs/2026-01-09_12-30-05_a", "a/runs/2026-01-10_12-30-05_a", "b/runs/2026-01-11_12-30-05_b"]
    assert len(list((tmp_path / names[1]).iterdir())) == 2, "the resumed run went on in it"


@pytest.mark.parametrize("named, project", [(None, "mini_llava"), ("mine", "mine")])
@pytest.mark.parametrize("kinds", [["wandb"], ["tensorboard", "wandb"]])
def test_another_tracker_gets_a_project_of_this_name_and_all_arguments(kinds, named, project, tmp_path, monkeypatch):
    config, projects = {}, []
    run = SimpleNamespace(finish=lambda: None)
    wandb = SimpleNamespace(
        init=lambda project: projects.append(project) or run,
        config=SimpleNamespace(update=lambda values, allow_val_change: config.update(values)),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    if named:
        monkeypatch.setenv("WANDB_PROJECT", named)
    accelerator = Accelerator(cpu=True, project_dir=str(tmp_path))
    accelerator.log_with = [LoggerType(kind) for kind in kinds]  # as if it were installed
    trackers.start(accelerator, {"seed": 1})
    assert [tracker.name for tracker in accelerator.trackers] == kinds
    trackers.end(accelerator)
    assert projects == [project] and config == {"seed": "1"}
    assert [path.name[20:] for path in tmp_path.glob("runs/*")] == [tmp_path.name] * ("tensorboard" in kinds)


@pytest.fixture
def skipped(tmp_path):
    """Three skipped records, the last one's line torn by a kill."""
    (tmp_path / "data.json").write_text(json.dumps([{"id": str(number)} for number in range(5)]))
    store, file = RecordStore([str(tmp_path / "data.json")]), tmp_path / "skipped.jsonl"
    log_skipped(store, [(index, "it has no answer.") for index in (1, 3, 4)], file)
    os.truncate(file, file.stat().st_size - 20)
    return store, file


def test_a_torn_list_of_skipped_records_ends_no_run(skipped):
    store, file = skipped
    assert count_skipped(file) == ["2 records: it has no answer."]
    with pytest.warns(UserWarning, match=r"--exclude .*skipped\.jsonl: the last line is torn and left out"):
        kept = RecordStore(store.data_path, exclude=[str(file)])
    assert [kept[index]["id"] for index in range(len(kept))] == ["0", "2", "4"]


def test_a_resumed_run_goes_on_with_the_list_after_its_last_whole_line(skipped):
    store, file = skipped
    prepare_reports(file.parent, 0)
    log_skipped(store, [(4, "it has no answer.")], file)
    assert [entry["index"] for entry in read_lines(file)] == [1, 3, 4]
    assert len(RecordStore(store.data_path, exclude=[str(file)])) == 2
