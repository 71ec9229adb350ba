"""What a run leaves to look at: its curves, its summary, and pages of TensorBoard, each true to its log."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mini_llava.data.records import RecordStore
from mini_llava.watch.curves import draw_curves, smoothed
from mini_llava.watch.first_batch import INK, PAPER
from mini_llava.watch.json_lines import append_lines
from mini_llava.watch.page import WIDTH
from mini_llava.watch.summary import duration, summarise, talk_command, write_summary
from mini_llava.watch.trackers import name_on_page
from tests.end_to_end.runs import FIXTURES, flags_of, plan_here, train_here


@pytest.fixture(autouse=True, scope="module")
def drawn():
    """What other tests' runs leave out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mini_llava.watch.summary.draw_curves", draw_curves)
        yield


def entry(step, loss, seconds=2.0, **more):
    rates = {"seconds_per_step": seconds, "samples_per_second": 4.0, "tokens_per_second": 100.0}
    return {"step": step, "loss": loss, **rates, "gradient_norm": loss, "learning_rate": 0.1, **more}


LOG = [
    {"step": 0, "eval/loss": 3.0, "eval/exact_match": 0.25, "eval/exact_match_shuffled": 0.25, "eval/seconds": 5.0},
    entry(10, 3.0),
    entry(20, 2.0, save_seconds=1.5),
    {"step": 20, "eval/loss": 1.0, "eval/exact_match": 0.75, "eval/seconds": 4.0},
    entry(25, 1.0, seconds=4.0),
    {"step": 25, "eval/loss": 1.5, "eval/exact_match": 0.5, "eval/seconds": 4.0},
]


def test_the_summary_is_what_the_log_says():
    found = summarise(LOG, 10, {"save_seconds": 0.5})
    assert found == {
        "steps": 25,
        "samples": 4 * 60,
        "tokens": 100 * 60,
        "seconds": {"training": 60.0, "evaluation": 13.0, "saving": 2.0},
        "last_loss": 1.0,
        "mean_loss_at_the_end": 1.0,
        "best_held_out": {"eval/loss": {"value": 1.0, "step": 20}, "eval/exact_match": {"value": 0.75, "step": 20}},
    }
    assert summarise(LOG[4:], 5, {})["samples"] == 80, "a run that came from another folder has its own steps only"


def test_durations_are_read_at_a_glance():
    assert [duration(seconds) for seconds in (0.04, 59.9, 185, 7470)] == ["0.0 s", "59.9 s", "3 min 5 s", "2 h 4 min"]


def test_smoothing_keeps_a_constant_and_starts_at_the_first_value():
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    assert smoothed([5.0, *[1.0] * 99])[0] == 5.0 and smoothed([5.0, *[1.0] * 99])[-1] == pytest.approx(1.0, abs=0.02)


def test_curves_have_a_panel_for_each_kind_of_value(tmp_path):
    log, file = tmp_path / "log.jsonl", tmp_path / "curves.png"
    append_lines(log, LOG)
    draw_curves(log, file)
    with_held_out = Image.open(file).size
    log.unlink()
    append_lines(log, [LOG[1], LOG[4]])
    with open(log, "a") as torn:
        torn.write('{"step": 26, "lo')
    draw_curves(log, file)
    assert with_held_out[1] == 2 * Image.open(file).height, "two rows of two panels, then one row of three"
    assert np.asarray(Image.open(file).convert("L")).std() > 10, "something is drawn"


def test_a_run_without_a_log_ends_with_warnings(tmp_path):
    (tmp_path / "data.json").write_text('[{"conversations": []}]')
    with pytest.warns(UserWarning) as caught:
        assert write_summary(tmp_path, 1, {}, RecordStore([str(tmp_path / "data.json")])) == ""
    assert ["curves.png" in str(each.message) for each in caught] == [True, False]
    assert "summary.json is not there; the run goes on (log.jsonl has no entry" in str(caught[1].message)


def test_the_command_that_talks_has_a_picture_that_is_there(tmp_path):
    records = [{"image": "gone.png"}, 3, {"image": ["a b.png", "gone.png"]}, {"image": "c.png"}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    for name in ("a b.png", "c.png"):
        (tmp_path / name).touch()
    store = RecordStore([str(tmp_path / "data.json")], [str(tmp_path)])
    assert talk_command(tmp_path / "out", store).endswith(f"{tmp_path}/out --image '{tmp_path}/a b.png'")


def test_trackers_group_values_into_pages():
    names = ("loss", "loss/chats", "loss_by_modality/image", "learning_rate", "learning_rate/projector", "mfu")
    found = [name_on_page(name) for name in (*names, "update_norm", "eval/accuracy")]
    assert found == [
        *("loss", "loss/chats", "loss/image_samples", "rates/learning_rate", "rates/projector", "speed/mfu"),
        *("norms/update_norm", "eval/accuracy"),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two steps, and what it printed."""
    folder = tmp_path_factory.mktemp("seen") / "run"
    values = {"report_to": "tensorboard", "max_steps": 2, "global_batch_size": 8, "save_strategy": "no"}
    values["group_by_modality_length"] = False  # so that the first batch has both
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *texts, **_: printed.append(" ".join(map(str, texts))))
        train_here(flags_of(2, folder, values))
    return folder, "\n".join(printed)


def test_a_finished_run_leaves_curves_a_summary_and_the_command_to_talk_to_it(run):
    folder, printed = run
    assert Image.open(folder / "curves.png").format == "PNG"
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert (summary["steps"], summary["samples"], summary["last_loss"]) == (2, 16, lines[-1]["loss"])
    took = sum(line["seconds_per_step"] for line in lines)
    assert summary["seconds"]["training"] == pytest.approx(took)
    *start, image = summary["talk_to_it"].split()
    assert start == ["python", "-m", "mini_llava.tools.chat", str(folder), "--image"]
    assert image.startswith(str(FIXTURES / "data" / "images")) and summary["talk_to_it"] in printed


def test_the_numbers_and_nouns_of_a_run_of_one_record_agree(tmp_path, capsys):
    records = json.loads((FIXTURES / "data" / "train_stage1.json").read_text())
    (tmp_path / "data.json").write_text(json.dumps(records[:1]))
    one = {"data_path": tmp_path / "data.json", "global_batch_size": 1, "max_steps": 1, "save_strategy": "no"}
    one |= {"warmup_ratio": 0}
    one |= {"eval_data_path": tmp_path / "data.json", "eval_image_folder": FIXTURES / "data" / "images"}
    train_here(flags_of(2, tmp_path / "run", one))
    printed = capsys.readouterr().out
    assert re.search(r"Tried the longest micro-batch \([\d,]+ tokens, 1 image through the tower\)", printed)
    assert "\n1 held-out question before training: " in printed
    assert re.search(r"\n1 step, 1 sample, [\d,]+ tokens\. Time: training ", printed)
    plan_here(flags_of(2, tmp_path / "plan", one | {"num_gpus": 1, "gpu_memory_gib": 80}))
    printed = capsys.readouterr().out
    assert "Global batch: 1 sample on 1 GPU, " in printed and " tokens, 1 image through the tower." in printed
    assert re.search(r"\n1 record, 1 with images, [\d,]+ tokens: 1 step, 1.00 epochs", printed)


def test_tensorboard_shows_pages_texts_and_the_samples_of_the_first_batch(run):
    [folder] = (run[0] / "runs").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0}).Reload()
    pages = {tag.split("/")[0] for tag in events.Tags()["scalars"]}
    assert pages == {"loss", "norms", "rates", "speed"}
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert "| learning_rate | 2e-05 |" in texts["arguments/text_summary"]
    assert "peak learning rate" in texts["what is trained/text_summary"]
    assert len(events.Tags()["images"]) == 8
    inks = set()
    for tag in events.Tags()["images"]:
        [picture] = events.Images(tag)
        assert (picture.step, picture.width) == (1, WIDTH)
        inks |= colours_of(picture.encoded_image_string)
    assert {*INK.values(), *PAPER.values()} <= inks


def colours_of(png: bytes) -> set[str]:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return {f"#{number:06x}" for number in np.unique(pixels @ [65536, 256, 1]).tolist()}
