"""What `Evaluation` tells about the evaluations that were made, and what it does when one cannot be made."""

import json

import pytest
import torch
from accelerate import Accelerator

from mini_llava import arguments as flags
from mini_llava.data.images import ImageReader, Picture
from mini_llava.data.records import RecordStore
from mini_llava.data.samples import Samples
from mini_llava.data.templates import get_template
from mini_llava.evaluation.evaluate import Evaluation
from mini_llava.evaluation.questions import read_questions
from mini_llava.evaluation.shown import GREEN, RED, ShownAnswer, as_picture, as_table
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.guards.preemption import Preemption
from mini_llava.training.lockstep import Lockstep
from mini_llava.watch.page import WIDTH
from tests.end_to_end import runs
from tests.training.tiny_llava import IMAGE_SIZE, TOKENS_PER_IMAGE, tiny_llava

PICTURES = runs.MODEL_AND_DATA["image_folder"]


class Blank(ImageReader):
    def open(self, folder: str, name: str, several: bool = False) -> Picture:
        return Picture(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), TOKENS_PER_IMAGE)


@pytest.fixture
def make(tmp_path):
    """`make(**flags)`: the evaluation of a tiny model on five questions and two choices, 20 steps in all."""
    textual = (get_template("v1"), load_tokenizer(runs.FIXTURES / "llm"))

    def make(**values) -> Evaluation:
        values = runs.held_out_flags(tmp_path) | {"eval_steps": 4} | values
        arguments = flags.parse_arguments(runs.flags_of(2, tmp_path, values))
        store = RecordStore(arguments.data.eval_data_path, arguments.data.eval_image_folder)
        samples = Samples(store, *textual, 512, Blank(TOKENS_PER_IMAGE, size=IMAGE_SIZE))
        accelerator, model = Accelerator(cpu=True), tiny_llava()
        lockstep = Lockstep(accelerator, Preemption(), max_skipped=0)
        return Evaluation(arguments, model, samples, read_questions(samples, None, 42), 20, lockstep)

    return make


def write_log(tmp_path, *entries: tuple[int, float, float, float]) -> None:
    names = ("step", "eval/loss", "eval/exact_match", "eval/choice")
    lines = [json.dumps(dict(zip(names, entry, strict=True))) for entry in entries]
    lines.insert(1, json.dumps({"step": 1, "loss": 0.1}))
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")


def test_the_best_evaluation_has_most_questions_right_and_then_the_lowest_loss(make, tmp_path):
    write_log(
        tmp_path, (0, 3.0, 0.0, 0.5), (4, 1.0, 0.2, 0.0), (8, 2.0, 0.4, 1.0), (12, 1.5, 0.8, 0.0), (16, 1.0, 0.0, 1.0)
    )
    held_out = make()
    # Right were 1, 1, 4, 4 and 2 of the seven: two in five are choices.
    assert [round(7 * held_out.share_right(entry)) for entry in held_out.history] == [1, 1, 4, 4, 2]
    assert held_out.best["step"] == 12
    held_out.history.append(held_out.best | {"step": 20})
    assert held_out.best["step"] == 20, "no earlier model is better"
    held_out.history.pop()
    assert held_out.in_a_word() == "held-out loss 1.0000, 29% right"


def test_without_an_evaluation_there_is_no_best_one(make):
    held_out = make()
    assert held_out.history == [] and held_out.best is None and held_out.in_a_word() == ""


def due(held_out: Evaluation) -> list[int]:
    return [step for step in range(21) if held_out.is_due(step)]


def test_an_evaluation_is_due_before_training_and_every_eval_steps_steps_but_once(make, tmp_path):
    assert due(make()) == [0, 4, 8, 12, 16], "the last one is made after the result is saved"
    assert due(make(eval_steps=0)) == [0]
    write_log(tmp_path, (0, 3.0, 0.0, 0.5), (4, 1.0, 0.2, 0.0))
    assert due(make()) == [8, 12, 16], "the log of a resumed run has the others"


def test_a_run_that_is_started_again_after_its_end_is_not_evaluated_again(make, tmp_path):
    write_log(tmp_path, (0, 3.0, 0.0, 0.5), (20, 1.0, 0.2, 0.0))
    before = (tmp_path / "log.jsonl").read_text()
    held_out = make()
    assert held_out.total_steps == 20 and held_out.evaluate(20, print)
    assert (tmp_path / "log.jsonl").read_text() == before


def test_memory_that_runs_out_is_said_with_the_flag_that_helps_and_the_model_trains_on(make):
    held_out = make()

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    held_out.model.vision_tower.register_forward_hook(fail)
    with pytest.raises(
        ValueError, match=r"while held-out questions were answered, 2 at once: lower --per_device_eval_b"
    ):
        held_out.evaluate(4, print)
    assert held_out.model.training and not held_out.evaluated


def test_every_kind_of_answer_is_drawn_and_stays_a_row_of_the_table():
    long, odd = "which of them is it, " * 40, "a | b\n<b>你好</b> & $c"
    shown = [
        ShownAnswer("a.json, record 1", [(PICTURES, "wide_rgb.png")] * 4, long, long, odd, True, 0.5),
        ShownAnswer("a.json, record 2", [], "2 + 2?", "4", "", False, 7.25),
        ShownAnswer("a.json, record 3", [(PICTURES, "square_rgb.png")], odd, "", "no", False, float("nan")),
    ]
    picture = as_picture(shown)
    assert picture.shape[1:] == (WIDTH, 3) and len(picture) < 200 * len(shown) and picture.dtype == "uint8"
    for colour in (GREEN, RED):
        assert (picture == [int(colour[place : place + 2], 16) for place in (1, 3, 5)]).all(-1).any()
    head, rule, *rows = as_table(shown).splitlines()
    assert len(rows) == 3 and {row.replace("\\|", "").count("|") for row in (head, rule, *rows)} == {7}
    assert "<b>" not in "".join(rows) and "你好" in rows[0]
