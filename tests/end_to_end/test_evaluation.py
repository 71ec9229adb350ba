"""Evaluation while a model trains: what it finds, where that is shown, and that no bit of the training notices."""

import json
import re
import shutil

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mini_llava.data.templates import BadRecord
from mini_llava.evaluation.evaluate import Evaluation
from mini_llava.watch import progress
from tests import forked_runs
from tests.end_to_end import runs

SHOWN = [*runs.HELD_OUT["words"], *runs.HELD_OUT["letters"]]
WITH_DROPOUT = runs.FIVE_STEPS | runs.LORA | {"lora_dropout": 0.2}


def evaluations(run) -> dict[int, dict]:
    return {entry["step"]: entry for entry in runs.log(run) if "eval/loss" in entry}


def samples(run) -> list[dict]:
    return [json.loads(line) for line in (run / "eval_samples.jsonl").read_text().splitlines()]


def bits(run) -> list[tuple[int, str, str]]:
    return [(e["step"], e["loss"].hex(), e["gradient_norm"].hex()) for e in runs.log(run) if "loss" in e]


def are_equal_to_the_last_bit(evaluated, plain, evaluated_after=(0, 1, 2, 3, 4, 5)) -> None:
    assert sorted(evaluations(evaluated)) == list(evaluated_after) and not evaluations(plain)
    assert len(bits(plain)) == evaluated_after[-1] and bits(evaluated) == bits(plain)
    weights, expected = runs.saved_weights(evaluated), runs.saved_weights(plain)
    assert weights.keys() == expected.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, expected[name])] == []


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory):
    """Two LoRA runs with dropout; the second is evaluated after every step, saved after three, and all is shown."""
    folder = tmp_path_factory.mktemp("dropout")
    looked_at = {"eval_steps": 1, "eval_samples_shown": 7, "report_to": "tensorboard"} | runs.held_out_flags(folder)
    saved = {"save_strategy": "steps", "save_steps": 3}
    flags = {"plain": {}, "evaluated": looked_at | saved}
    lines = {name: runs.flags_of(2, folder / name, WITH_DROPOUT | values) for name, values in flags.items()}
    for line in lines.values():
        runs.train_here(line)
    return folder, lines["evaluated"]


@pytest.mark.slow
def test_evaluation_changes_no_bit_of_a_training_with_dropout(with_dropout):
    folder, _ = with_dropout
    are_equal_to_the_last_bit(folder / "evaluated", folder / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_evaluation_changes_no_bit_of_a_quantised_training(tmp_path, monkeypatch, bits):
    # On CPUs that have AVX512-BF16 bitsandbytes packs 4-bit weights anew for products in evaluation. The packing itself
    # is plain PyTorch, so that this shows on every CPU whether the training lives through it.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    for name, values in (("plain", {}), ("evaluated", {"eval_steps": 2} | runs.held_out_flags(tmp_path))):
        runs.train_here(runs.flags_of(2, tmp_path / name, WITH_DROPOUT | {"bits": bits, "max_steps": 3} | values))
    are_equal_to_the_last_bit(tmp_path / "evaluated", tmp_path / "plain", evaluated_after=(0, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero3"])
def test_evaluation_changes_no_bit_of_a_training_on_two_processes(two_processes, backend):
    plain = two_processes(backend, "stage2-clipped")
    evaluated = two_processes(backend, "evaluated-stage2-clipped")
    are_equal_to_the_last_bit(evaluated, plain, evaluated_after=(0, 2, 4, 5))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero3"])
def test_two_processes_find_what_one_finds(one_process, two_processes, backend):
    one, two = (run("evaluated-stage2-clipped") for run in (one_process, lambda name: two_processes(backend, name)))
    before, expected = evaluations(two)[0], evaluations(one)[0]
    assert before.keys() == expected.keys() >= {"eval/loss/words", "eval/exact_match", "eval/choice_shuffled"}
    assert (before["eval/exact_match/words"], before["eval/choice/letters"]) == (
        before["eval/exact_match"],
        before["eval/choice"],
    )  # each file has one kind
    for name in before.keys() - {"eval/seconds"}:
        assert before[name] == pytest.approx(expected[name], rel=1e-6), name  # fp32 sums in another order
    shown = zip(samples(two), samples(one), strict=True)
    assert [ours["answer"] for ours, _ in shown if ours["step"] == 0] == [
        sample["answer"] for sample in samples(one) if sample["step"] == 0
    ]


def print_what_is_gathered() -> None:
    """Has every evaluation of ZeRO-3 print how much of the model it has gathered."""
    gathered, name = [], "_PartitionedParameterCoordinator__all_gather_params_"
    gather, evaluate = getattr(PartitionedParameterCoordinator, name), Evaluation.evaluate

    def counting(self, parameters, *others, **more):
        gathered.extend(each.ds_numel for each in parameters if each.ds_status == ZeroParamStatus.NOT_AVAILABLE)
        return gather(self, parameters, *others, **more)

    def printing(self, step, log):
        gathered.clear()
        whole = sum(parameter.ds_numel for parameter in self.model.parameters())
        is_done = evaluate(self, step, log)
        print(f"\nevaluation {step} gathers {sum(gathered) / whole:.3f} of {whole}", flush=True)
        return is_done

    setattr(PartitionedParameterCoordinator, name, counting)
    Evaluation.evaluate = printing


@pytest.mark.slow
@pytest.mark.parametrize("live", [10**9, 150_000])
def test_under_zero3_an_evaluation_gathers_no_weight_twice(tmp_path, live):
    """Each token of an answer needs all 236,064 of them, of which the second limit lets training keep a part."""
    config, line = runs.config_file("zero3", tmp_path), runs.command_line("evaluated-stage2-clipped", tmp_path)
    deepspeed = json.loads((tmp_path / "deepspeed.json").read_text())
    deepspeed["zero_optimization"]["stage3_max_live_parameters"] = live
    (tmp_path / "deepspeed.json").write_text(json.dumps(deepspeed))
    run = forked_runs.start(line, tmp_path / "printed.txt", config, 2, inside=print_what_is_gathered)
    assert run.wait() == 0, run.text[-5000:]
    shares = {int(step): float(share) for step, share in re.findall(r"evaluation (\d) gathers ([\d.]+) of", run.text)}
    assert shares.keys() == {0, 2, 4, 5}, run.text[-3000:]
    # Less than all: layers of the tower behind the selected one are not used; before step 1 the trial has gathered.
    assert max(shares.values()) <= 1 and min(shares[step] for step in (2, 4)) > 0.5, shares


@pytest.mark.parametrize("how", [{"packing": True}, {"packing": False}, {**runs.LORA, "bits": 8}])
def test_the_held_out_loss_of_the_training_records_is_the_loss_of_the_step_that_trains_on_them(tmp_path, how):
    """The last batch of evaluation is smaller than the others, and answers differ in length: tokens count alike."""
    records = [record | {"conversations": record["conversations"][:2]} for record in runs.RECORDS[:11]]
    (tmp_path / "data.json").write_text(json.dumps(records))
    both = {"data_path": tmp_path / "data.json", "eval_data_path": tmp_path / "data.json", **how}
    both |= {"eval_image_folder": runs.MODEL_AND_DATA["image_folder"], "per_device_eval_batch_size": 3}
    both |= {"eval_samples_shown": 11}
    values = {
        "max_steps": 1,
        "warmup_ratio": 0,
        "global_batch_size": 11,
        "per_device_train_batch_size": 11,
        "save_strategy": "no",
    }
    runs.train_here(runs.flags_of(2, tmp_path / "run", values | both))
    before, step, _ = runs.log(tmp_path / "run")
    for name in ("loss", "loss_by_modality/text", "loss_by_modality/image"):
        assert before[f"eval/{name}"] == pytest.approx(step[name], rel=1e-6)  # fp32 sums in another order
    of_records = [sample["loss"] for sample in samples(tmp_path / "run") if sample["step"] == 0]
    assert len(of_records) == 11 and before["eval/loss"] != pytest.approx(sum(of_records) / 11, rel=1e-5)


@pytest.mark.slow
def test_images_are_shuffled_before_and_after_training_alone(with_dropout):
    found = evaluations(with_dropout[0] / "evaluated")
    shuffled = {"eval/exact_match_shuffled", "eval/choice_shuffled"}
    assert {step for step, entry in found.items() if shuffled <= entry.keys()} == {0, 5}
    assert {step for step, entry in found.items() if shuffled & entry.keys()} == {0, 5}
    assert found[5]["eval/loss"] < found[0]["eval/loss"], "it learns to answer"


@pytest.mark.slow
def test_the_same_questions_are_shown_at_every_evaluation_with_what_is_expected_and_written(with_dropout):
    shown = samples(with_dropout[0] / "evaluated")
    assert [sample["step"] for sample in shown] == [step for step in range(6) for _ in SHOWN]
    for number, sample in enumerate(shown):
        record = SHOWN[number % len(SHOWN)]
        question, answer = (turn["value"] for turn in record["conversations"])
        assert f"(id {record['id']})" in sample["record"]
        assert sample["images"] == ([record["image"]] if "image" in record else [])
        assert (sample["question"], sample["expected"]) == (question.replace("<image>", "").strip(), answer)
        assert sample["right"] is (sample["answer"] == answer) and sample["loss"] > 0


@pytest.mark.slow
def test_tensorboard_has_the_scores_the_pictures_and_the_answers_of_every_evaluation(with_dropout):
    [folder] = (with_dropout[0] / "evaluated" / "runs").iterdir()
    events = EventAccumulator(str(folder), {"images": 0}).Reload()
    found = evaluations(with_dropout[0] / "evaluated")
    for name in ("eval/loss", "eval/loss/letters", "eval/loss_by_modality/image", "eval/choice", "eval/seconds"):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(step, pytest.approx(entry[name], rel=1e-6)) for step, entry in found.items()]
    pictures = events.Images("eval/answers")
    assert [picture.step for picture in pictures] == list(range(6))
    assert len({picture.encoded_image_string for picture in pictures}) == 5, "the rate of the first step is 0"
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("eval/answers/text_summary")]
    assert len(texts) == 6 and all(text.count("A or B? | B |") == 2 for text in texts)


@pytest.mark.slow
def test_the_time_of_an_evaluation_is_logged_and_is_not_the_trainings(with_dropout):
    run = with_dropout[0] / "evaluated"
    [folder] = (run / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    passed = events.Scalars("loss")[-1].wall_time - events.Scalars("eval/loss")[0].wall_time
    training = sum(entry["seconds_per_step"] for entry in runs.log(run) if "loss" in entry)
    evaluating = sum(evaluations(run)[step]["eval/seconds"] for step in range(1, 5))
    assert evaluating > 0 and training + evaluating < passed + 0.01, "no second counts twice"


@pytest.mark.slow
def test_a_resumed_run_keeps_the_evaluations_and_makes_up_for_one_that_a_kill_took(with_dropout):
    folder, command_line = with_dropout
    whole, resumed = folder / "evaluated", folder / "resumed"
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    for name in ("log.jsonl", "eval_samples.jsonl"):  # killed after the checkpoint, before it was evaluated
        lines = (whole / name).read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] < 3 or '"step": 3, "loss"' in line]
        (resumed / name).write_text("".join(kept))
    assert max(evaluations(resumed)) == 2
    again = [str(resumed) if text == str(whole) else text for text in command_line]
    runs.train_here([*again, "--resume_from_checkpoint", "latest"])
    clocks = {"eval/seconds"}
    assert [{k: v for k, v in e.items() if k not in clocks} for e in evaluations(resumed).values()] == [
        {k: v for k, v in e.items() if k not in clocks} for e in evaluations(whole).values()
    ]
    assert samples(resumed) == samples(whole) and bits(resumed) == bits(whole)


@pytest.mark.slow
def test_who_knows_the_answers_by_heart_gets_all_of_them_right_and_is_seen_to(tmp_path, capsys):
    held_out = runs.held_out_flags(tmp_path)
    learnt = {"data_path": held_out["eval_data_path"], "image_folder": held_out["eval_image_folder"]}
    values = {"max_steps": 40, "eval_steps": 20, "learning_rate": 1e-2, "warmup_ratio": 0, "save_strategy": "no"}
    values |= {"global_batch_size": 7, "per_device_train_batch_size": 7, "group_by_modality_length": False}
    values |= {"dataloader_num_workers": 1}
    runs.train_here(runs.flags_of(2, tmp_path / "run", values | held_out | learnt))
    before, between, after = evaluations(tmp_path / "run").values()
    assert before["eval/exact_match"] == before["eval/choice"] == 0
    assert after["eval/exact_match"] == after["eval/choice"] == 1 and after["eval/loss"] < 0.1
    assert [sample["right"] for sample in samples(tmp_path / "run")][-7:] == [True] * 7
    out, err = capsys.readouterr()
    for moment in ("before training", "after step 20", "after training"):
        assert out.count(f"7 held-out questions {moment}: ") == 1
    assert (
        "after training: 100.0% of 5 answered exactly, 100.0% with the images shuffled, 100.0% of 2 chosen right" in out
    )
    assert "It was best" not in out
    # The progress line has the newest one.
    assert f"held-out loss {before['eval/loss']:.4f}, 0% right" in err
    assert f"held-out loss {between['eval/loss']:.4f}" in err


@pytest.mark.slow
def test_an_evaluation_shows_how_many_questions_are_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0)
    values = {"max_steps": 2, "eval_steps": 1, "save_strategy": "no"} | runs.held_out_flags(tmp_path)
    runs.train_here(runs.flags_of(2, tmp_path / "run", values))
    bars = re.findall(r"\r(held[^\r:]*): 100%\S+ (\d+)/(\d+) \[.*\]\n", capsys.readouterr().err)
    with_shuffled = ("held-out questions, images in place and shuffled", "12", "12")  # two of the seven have no image
    assert bars == [with_shuffled, ("held-out questions", "7", "7"), with_shuffled]


@pytest.mark.slow
def test_a_training_that_spoils_the_model_is_told_when_it_was_best(tmp_path, capsys):
    values = {"max_steps": 2, "learning_rate": 1, "warmup_ratio": 0, "save_strategy": "no", "eval_samples_shown": 0}
    runs.train_here(runs.flags_of(2, tmp_path / "run", values | runs.held_out_flags(tmp_path)))
    before, after = evaluations(tmp_path / "run").values()
    assert after["eval/loss"] > before["eval/loss"]
    assert "It was best before training: 0.0% right." in capsys.readouterr().out
    assert not (tmp_path / "run" / "eval_samples.jsonl").exists()


WORD, LETTER = runs.HELD_OUT["words"][0], runs.HELD_OUT["letters"][0]
UNANSWERED = dict(WORD, conversations=WORD["conversations"][:1])


@pytest.mark.parametrize(
    "records, sentence",
    [
        ([WORD, dict(WORD, metric="f1")], r"bad\.json, record 1 \(id s2_\d+\): its 'metric' is 'f1'; known are"),
        ([dict(LETTER, conversations=WORD["conversations"])], r"record 0 \(id letter 0\): .* names no letter"),
        (
            [dict(WORD, image="gone.png"), dict(WORD, metric=1)],
            r"2 of 2 records cannot be asked; fix them.(\n +1  .*\n.*){2}$",
        ),
        ([UNANSWERED], r"record 0 \(id s2_\d+\): no question has an answer"),
        ([dict(WORD, conversations=WORD["conversations"] + WORD["conversations"][:1])], "marks for 1 image"),
    ],
)
def test_held_out_records_that_cannot_be_asked_end_the_run_before_the_model_is_read(records, sentence, tmp_path):
    (tmp_path / "bad.json").write_text(json.dumps(records))
    held_out = {"eval_data_path": tmp_path / "bad.json", "eval_image_folder": runs.MODEL_AND_DATA["image_folder"]}
    with pytest.raises(BadRecord, match=f"^--eval_data_path: .*{sentence}"):
        runs.train_here(runs.flags_of(2, tmp_path / "run", held_out))
    assert not list((tmp_path / "run").glob("*.jsonl"))


def test_a_held_out_picture_that_turns_out_torn_is_named_before_step_1(tmp_path):
    image = runs.MODEL_AND_DATA["image_folder"] / WORD["image"]
    (tmp_path / "torn.png").write_bytes(image.read_bytes()[:200])
    (tmp_path / "bad.json").write_text(json.dumps([dict(WORD, image="torn.png")]))
    held_out = {"eval_data_path": tmp_path / "bad.json", "eval_image_folder": tmp_path, "save_strategy": "no"}
    with pytest.raises(BadRecord, match=r"^--eval_data_path: .*bad\.json, record 0 .*: the image '.*torn\.png' cannot"):
        runs.train_here(runs.flags_of(2, tmp_path / "run", held_out | {"max_steps": 1, "warmup_ratio": 0}))
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_errors_about_held_out_files_name_their_own_flags(tmp_path):
    for values, sentence in (
        ({"eval_data_path": [tmp_path / "none.json"] * 2}, r"none\.json \(--eval_data_path\) does not exist"),
        ({"eval_image_folder": [tmp_path / "none"] * 2}, r"none \(--eval_image_folder\) does not exist"),
        ({"eval_image_folder": [tmp_path, tmp_path, tmp_path]}, "--eval_data_path lists 2 files and --eval_image_fol"),
    ):
        with pytest.raises((ValueError, OSError), match=sentence):
            runs.train_here(runs.flags_of(2, tmp_path / "run", runs.held_out_flags(tmp_path) | values))
