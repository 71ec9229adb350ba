"""What the progress line and the log say is what happened."""

import contextlib
import json
import math
import os
import re
import termios

import pytest
import torch
from accelerate import Accelerator

from mini_llava.data.collator import sample_of_targets
from mini_llava.data.loader import RankMicroBatch, RankStep, loss_group
from mini_llava.data.tokenization import IGNORE_INDEX
from mini_llava.watch import progress as meters
from mini_llava.watch.flops import FlopCounter
from mini_llava.watch.json_lines import append_json_line
from mini_llava.watch.meter import Meter, loss_parts
from mini_llava.watch.progress import ProgressLine, questions_bar
from tests.training.tiny_llava import micro_batch, tiny_llava

VALUES = {"loss": 1.5, "learning_rate": 1e-3, "gradient_norm": 0.5}
VALUES |= {"tokens_per_second": 1.0, "samples_per_second": 1.0, "data_wait": 0.0}


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def step(*lengths: int, samples: int = 1) -> RankStep:
    """A step with one packed micro-batch of text for each length."""
    return RankStep([micro_batch([length]) for length in lengths], [], tokens=sum(lengths), samples=samples)


def add(meter: Meter, loss: torch.Tensor, token_losses=None, groups=None) -> None:
    meter.add(RankMicroBatch({}, 0, groups, is_last=True), token_losses, loss)


def test_loss_is_the_mean_over_steps_of_the_sum_over_micro_batches(clock):
    meter = Meter(Accelerator(cpu=True), FlopCounter(tiny_llava()))
    for losses in ((0.5, 0.25), (1.0,)):
        for loss in losses:
            add(meter, torch.tensor(loss, requires_grad=True))
        meter.add_step(step(20, 10, samples=4))
    clock[0] += 4
    assert meter.read() == dict(
        loss=0.875,
        tokens_per_second=15.0,
        computed_tokens_per_second=15.0,
        padding=0.0,
        samples_per_second=2.0,
        seconds_per_step=2.0,
        data_wait=0.0,
    )


def test_the_loss_of_a_part_is_the_mean_over_its_trained_tokens(clock):
    parts = loss_parts(["captions", "chats"], [True, False, True])
    assert list(parts) == ["loss/captions", "loss/chats", "loss_by_modality/text", "loss_by_modality/image"]
    meter = Meter(Accelerator(cpu=True), FlopCounter(tiny_llava()), parts)
    work = RankStep([micro_batch([6, 6], images=1, packed=packed) for packed in (True, False)], [])
    # A caption of an image, of which 2 tokens are trained, and a chat without one, of which 3 are.
    groups = torch.tensor([loss_group(0, True), loss_group(1, False)])
    for batch in work.micro_batches:
        work.loss_groups.append(groups[sample_of_targets(batch)])
        trained = batch["targets"] != IGNORE_INDEX
        add(meter, torch.tensor(0.0), torch.where(trained, work.loss_groups[-1] + 0.5, 0.0), work.loss_groups[-1])
    meter.add_step(work)
    assert meter.group_tokens.tolist() == [0, 4, 6, 0]
    clock[0] += 1
    values = meter.read()
    expected = {"loss/captions": 1.5, "loss/chats": 2.5, "loss_by_modality/text": 2.5, "loss_by_modality/image": 1.5}
    assert {name: values[name] for name in parts} == expected
    meter.add_step(RankStep([], []))
    clock[0] += 1
    assert not set(parts) & set(meter.read()), "of a part without tokens nothing is known"


def test_one_data_file_of_one_modality_has_no_parts():
    assert loss_parts(["captions"], [True, True]) == {}
    assert list(loss_parts(["a", "b"], [False, False])) == ["loss/a", "loss/b"]
    assert list(loss_parts(["a"], [False, True])) == ["loss_by_modality/text", "loss_by_modality/image"]


def test_reading_starts_anew_and_evaluation_does_not_count(clock):
    meter = Meter(Accelerator(cpu=True), FlopCounter(tiny_llava()))
    add(meter, torch.tensor(9.0))
    meter.add_step(step(1000, samples=1000))
    clock[0] += 1
    meter.read()
    with meter.paused("save_seconds"):
        clock[0] += 500
    add(meter, torch.tensor(2.0))
    meter.add_step(step(6))
    clock[0] += 3
    values = meter.read()
    assert (values["loss"], values["seconds_per_step"]) == (2.0, 3.0)
    assert (values["tokens_per_second"], values["samples_per_second"]) == (2.0, 1 / 3)
    assert values["save_seconds"] == 500


def test_waiting_for_data_is_a_share_of_the_time(clock):
    def slow_loader():
        for _ in range(2):
            clock[0] += 1  # reading
            yield step(5)

    meter = Meter(Accelerator(cpu=True), FlopCounter(tiny_llava()))
    for work in meter.waiting_for(slow_loader()):
        clock[0] += 3  # training
        meter.add_step(work)
    values = meter.read()
    assert (values["data_wait"], values["seconds_per_step"]) == (0.25, 4.0)


def test_padding_is_computed_but_not_counted_as_tokens(clock):
    meter = Meter(Accelerator(cpu=True), FlopCounter(tiny_llava()))
    meter.add_step(RankStep([micro_batch([8, 2], packed=False)], [], tokens=10, samples=2))
    clock[0] += 2
    values = meter.read()
    assert (values["tokens_per_second"], values["computed_tokens_per_second"]) == (5.0, 8.0)
    assert values["padding"] == 1 - 10 / 16


def test_there_is_no_mfu_where_no_peak_is_known(clock):
    meter = Meter(Accelerator(cpu=True), FlopCounter(tiny_llava()))
    meter.add_step(step(5))
    clock[0] += 1
    assert not {"mfu", "mfu_6n", "peak_memory_gib"} & meter.read().keys()


def test_mfu_is_useful_arithmetic_over_what_the_device_could_do(clock):
    meter = Meter(Accelerator(cpu=True), FlopCounter(tiny_llava()))
    meter.flops_of.peak = 1e9
    work = step(50, 30)
    meter.add_step(work)
    clock[0] += 2
    values = meter.read()
    assert values["mfu"] == sum(map(meter.flops_of, work.micro_batches)) / 2e9
    assert values["mfu_6n"] == 6 * meter.flops_of.language_model_parameters * 80 / 2e9


def test_the_log_keeps_every_bit(tmp_path):
    values = {"step": 3, "loss": math.pi / 7, "gradient_norm": 1e-310}
    append_json_line(tmp_path / "log.jsonl", values)
    append_json_line(tmp_path / "log.jsonl", values)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [values, values]
    assert json.loads(lines[0])["loss"].hex() == (math.pi / 7).hex()


@pytest.mark.parametrize(
    ("loss", "shown"),
    [(1.23456, "loss 1.2346,"), (0.0, "loss 0.0000,"), (2.2e-6, "loss 2.2e-06,"), (math.nan, "loss nan,")],
)
def test_a_loss_that_is_small_is_not_shown_as_none(loss, shown, capfd):
    line = ProgressLine(total_steps=2, first_step=0, enabled=True)
    line.update(1, VALUES | {"loss": loss})
    line.close()
    assert shown in capfd.readouterr().err


def test_the_line_says_which_loss_it_shows(capfd):
    """Global batches of text alone begin with a loss near 0 where the language model knows the answers."""
    line = ProgressLine(total_steps=3, first_step=0, enabled=True, loss="answer loss")
    image, text = {"loss_by_modality/image": 1.5}, {"loss_by_modality/text": 0.25}
    for step, parts in enumerate((image, text, image | text), start=1):
        line.update(step, VALUES | parts)
        line.bar.refresh()
    line.close()
    shown = capfd.readouterr().err
    for loss in ("answer loss 1.5000 (images), lr", "answer loss 1.5000 (text only), lr", "answer loss 1.5000, lr"):
        assert loss in shown


def screen(written: str) -> list[str]:
    """What a terminal shows after this was written: lines, without those that are empty at the end."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]+", written):
        if part == "\x1b[A":
            row -= 1
        elif part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            line = lines[row].ljust(column)
            lines[row], column = line[:column] + part + line[column + len(part) :], column + len(part)
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.rstrip() for line in lines]


@contextlib.contextmanager
def terminal():
    """A real one of 120 columns as stderr and stdout; what is yielded returns what it shows."""
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (40, 120))
    os.set_blocking(reader, False)
    file, written = open(writer, "w", buffering=1), []  # noqa: SIM115

    def show() -> list[str]:
        file.flush()
        while True:
            try:
                written.append(os.read(reader, 65536).decode())
            except BlockingIOError:
                return screen("".join(written))

    with contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        yield show
    file.close()
    os.close(reader)


def test_on_a_terminal_the_bar_of_questions_stands_below_the_progress_line_and_goes(monkeypatch):
    monkeypatch.setattr(meters, "SHOWN_AFTER", 0)
    with terminal() as shown:
        line = ProgressLine(total_steps=4, first_step=0, enabled=True)
        line.update(2, VALUES)
        line.bar.refresh()
        before = shown()
        with questions_bar(7, "held-out answers", enabled=True) as bar:
            bar.update(3)
            bar.refresh()
            progress, of_questions = shown()
            assert [progress] == before and progress.startswith(" 50% step 2/4 [") and ", loss 1.5000, lr " in progress
            assert of_questions.startswith("held-out answers:  43%|") and " 3/7 " in of_questions
            bar.update(4)
        assert shown() == before
        line.log("7 held-out questions after step 2: all right.")
        line.update(3, VALUES)
        line.close()
        said, progress = shown()
        assert said == "7 held-out questions after step 2: all right." and progress.startswith(" 75% step 3/4 [")


def test_in_a_file_the_bar_of_questions_moves_no_cursor_and_stays(capsys, monkeypatch):
    monkeypatch.setattr(meters, "SHOWN_AFTER", 0)
    line = ProgressLine(total_steps=4, first_step=0, enabled=True)
    with questions_bar(7, "held-out answers", enabled=True) as bar:
        bar.update(7)
    line.close()
    with questions_bar(7, "of another rank", enabled=False) as bar:
        bar.update(7)
    written = capsys.readouterr().err
    assert "\x1b" not in written and "another rank" not in written
    assert re.search(r"\rheld-out answers: 100%\S+ 7/7 \[.*\]\n", written)


def test_what_is_evaluated_in_a_moment_has_no_bar(capsys):
    with questions_bar(7, "held-out answers", enabled=True) as bar:
        bar.update(7)
    assert capsys.readouterr().err == ""
