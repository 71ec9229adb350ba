"""The embedded default: the converted data, and the two miniature models as they are shipped."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessor, CLIPVisionModel

from mini_llava import demo
from mini_llava.arguments import STAGE_CONFIGS, resolve
from mini_llava.data.templates import get_template
from mini_llava.tools.chat import Conversation
from mini_llava.tools.saved_models import open_saved
from tests.end_to_end import runs
from tests.readme import README, block_with


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return demo.prepare(tmp_path_factory.mktemp("outputs"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def turns(record):
    spoken = [turn["value"] for turn in record["conversations"]]
    return list(zip(spoken[::2], spoken[1::2], strict=True))


def test_every_image_that_a_record_names_is_there_and_is_64_pixels_square(data):
    names = {
        record["image"] for path in (data.stage1, data.stage2, data.test) for record in read(path) if "image" in record
    }
    assert len(names) == 5000
    for name in sorted(names)[::100]:
        with Image.open(data.images / name) as image:
            assert image.size == (64, 64)


def test_no_test_image_and_no_test_pair_of_image_and_question_is_trained_on(data):
    def pairs(records):
        return {
            (record["image"], question.removeprefix("<image>\n")) for record in records for question, _ in turns(record)
        }

    trained = [record for path in (data.stage1, data.stage2) for record in read(path) if "image" in record]
    held_out = read(data.test)
    assert {record["image"] for record in trained}.isdisjoint(record["image"] for record in held_out)
    assert pairs(trained).isdisjoint(pairs(held_out))
    assert all(record["image"].startswith("train/") for record in trained)


def test_the_test_file_holds_the_official_questions_one_a_record(data):
    records = read(data.test)
    official = {
        (f"test/{image}.png", question, answer)
        for image, asked in demo.read_questions("test").items()
        for question, answer in asked
    }
    assert len(records) == 9673
    assert len({record["id"] for record in records}) == 9673
    assert {(record["image"], *turns(record)[0]) for record in records} == {
        (image, f"<image>\n{question}", answer) for image, question, answer in official
    }


def test_stage_2_holds_every_training_question_and_a_share_of_text_only_records(data):
    records = read(data.stage2)
    with_image = [record for record in records if "image" in record]
    assert sum(len(turns(record)) for record in with_image) == 38575
    assert len(records) - len(with_image) == demo.TEXT_ONLY_RECORDS
    for record in records:
        text = json.dumps(record["conversations"])
        assert text.count("<image>") == ("image" in record)


def test_captions_say_what_the_questions_tell(data):
    captions = {record["image"]: turns(record)[0][1] for record in read(data.stage1)}
    assert len(captions) > 3500
    for image, asked in demo.read_questions("train").items():
        for question, answer in asked:
            if f"train/{image}.png" in captions and answer not in ("yes", "no"):
                assert answer in captions[f"train/{image}.png"].split(), (image, question)


def test_a_denied_denial_tells_the_shape_and_elimination_tells_the_colour():
    assert demo.shape_and_colour([("is there not a circle?", "no")]) == ("circle", None)
    assert demo.shape_and_colour([("is there a circle?", "no"), ("is no triangle present?", "yes")]) == (
        "rectangle",
        None,
    )
    assert demo.shape_and_colour([("what is the red shape?", "circle")]) == ("circle", "red")


def test_preparing_again_changes_nothing(data):
    root = data.images.parent.parent
    before = {path: path.stat().st_mtime_ns for path in (data.stage1, data.stage2, data.test)}
    assert demo.prepare(root) == data
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert [path.name for path in root.iterdir()] == ["demo-data"]


@pytest.mark.slow
def test_an_interrupted_conversion_leaves_no_data_folder_and_a_later_one_has_the_same_bytes(
    data, tmp_path, monkeypatch
):
    def interrupt(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(demo.shutil, "copyfile", interrupt)
        with pytest.raises(KeyboardInterrupt):
            demo.prepare(tmp_path)
    assert not (tmp_path / "demo-data").exists()
    again = demo.prepare(tmp_path)
    for name in ("stage1", "stage2", "test"):
        assert getattr(again, name).read_bytes() == getattr(data, name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["demo-data"]


def test_the_best_guess_without_the_image_is_right_for_two_questions_in_three():
    assert demo.question_only_baseline() == pytest.approx(0.670, abs=0.001)


def test_both_models_load_with_from_pretrained_and_take_less_than_5_mb():
    files = [
        path for folder in (demo.VISION_TOWER, demo.LANGUAGE_MODEL) for path in folder.rglob("*") if path.is_file()
    ]
    assert sum(path.stat().st_size for path in files) < 5e6
    tower = CLIPVisionModel.from_pretrained(demo.VISION_TOWER)
    processor = CLIPImageProcessor.from_pretrained(demo.VISION_TOWER)
    language_model = AutoModelForCausalLM.from_pretrained(demo.LANGUAGE_MODEL)
    assert {parameter.dtype for model in (tower, language_model) for parameter in model.parameters()} == {torch.float16}
    image = Image.new("RGB", (64, 64), "white")
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
    assert (tower.config.image_size // tower.config.patch_size) ** 2 == 64


def test_the_tokenizer_cuts_like_llama_and_gives_every_text_back():
    tokenizer = AutoTokenizer.from_pretrained(demo.LANGUAGE_MODEL)
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.convert_ids_to_tokens(tokenizer(" ASSISTANT: no</s>USER:\nis").input_ids) == (
        ["<s>", "▁", "▁ASSISTANT", ":", "▁no", "</s>", "USER", ":", "<0x0A>", "is"]
    )
    for text in ("is there not a circle?", "  two blanks", "Grüße, 你好 🙂\ttab\n", ""):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_language_model_answers_from_a_description_before_it_has_seen_any_image():
    tokenizer = AutoTokenizer.from_pretrained(demo.LANGUAGE_MODEL)
    model = AutoModelForCausalLM.from_pretrained(demo.LANGUAGE_MODEL, dtype=torch.float32)
    for question, answer in (
        ("is there not a circle?", "no"),
        ("is there not a triangle?", "yes"),
        ("is a red shape present?", "yes"),
        ("what color is the shape?", "red"),
    ):
        prompt = f"{get_template('v1').opening}the picture shows a red circle.\n{question} ASSISTANT:"
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        written = model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs.input_ids.shape[1] :]
        assert tokenizer.decode(written) == f"{answer}</s>"


@pytest.mark.parametrize("stage", [1, 2])
def test_the_configs_name_the_shipped_models_and_the_converted_data(stage, data):
    config = yaml.safe_load(STAGE_CONFIGS[stage].read_text(encoding="utf-8"))
    root = demo.HERE.parent.parent
    assert root / config["model_name_or_path"] == demo.LANGUAGE_MODEL
    assert root / config["vision_tower"] == demo.VISION_TOWER
    converted = data.images.parent
    for flag in ("data_path", "image_folder", "eval_data_path", "eval_image_folder"):
        paths = config[flag] if isinstance(config[flag], list) else [config[flag]]
        for path in paths:
            assert (converted / Path(path).relative_to("outputs/demo-data")).exists(), flag


def test_stage_2_starts_from_the_projector_of_stage_1_and_says_so_when_there_is_none(tmp_path, monkeypatch):
    (tmp_path / "mini_llava").symlink_to(demo.HERE.parent)
    monkeypatch.chdir(tmp_path)
    given = resolve(2, {})
    arguments, lines = demo.prepare_run(given)
    assert "There is no outputs/demo-stage1/mm_projector.bin" in lines
    assert arguments.model.pretrain_mm_mlp_adapter is None and given.model.pretrain_mm_mlp_adapter is not None

    projector = Path("outputs/demo-stage1/mm_projector.bin")
    projector.parent.mkdir()
    projector.touch()
    arguments, lines = demo.prepare_run(resolve(2, {}))
    assert arguments.model.pretrain_mm_mlp_adapter == str(projector)
    assert "from stage 1: outputs/demo-stage1/mm_projector.bin" in lines
    assert "67.0%" in lines and "--model_name_or_path" in lines


def test_started_elsewhere_than_in_the_repository_the_demo_says_where_to_start_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="from the repository's root"):
        demo.prepare_run(resolve(1, {}))
    assert not any(tmp_path.iterdir())


def write_scores(folder: Path, *entries: tuple) -> None:
    """A log of steps with loss, and of evaluations with questions answered and, if given, with images shuffled."""
    folder.mkdir(parents=True)
    keys = ("step", "eval/exact_match", "eval/exact_match_shuffled")
    lines = [dict(zip(keys, entry, strict=False)) | {"eval/loss": 1.0} for entry in entries]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 1, "loss": 2.0}, *lines]))


def cells(table: str) -> list[list[str]]:
    return [re.split(" {2,}", line.strip()) for line in table.splitlines() if line.startswith("  ")]


def test_the_demo_ends_with_readmes_table_of_what_its_logs_say(tmp_path):
    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if re.match(r"\| (before|after|best)", line)]
    readme = [[cell.replace(" %", "%") for cell in row] for row in rows]
    numbers = [[float(cell.rstrip("%")) / 100 for cell in row[1:]] for row in readme[:3]]
    one, two = tmp_path / "demo-stage1", tmp_path / "demo-stage2"
    write_scores(one, (0, *numbers[0]), (20, 0.75), (40, *numbers[1]))
    write_scores(two, (0, 0.8, 0.5), (36, *numbers[2]))
    for projector in (one / "mm_projector.bin", one):
        table = demo.table_of_scores(2, two, str(projector))
        assert cells(table) == [["images in place", "images shuffled"], *readme] and "Missing" not in table


def test_the_table_says_which_scores_are_missing(tmp_path):
    one, two = tmp_path / "demo-stage1", tmp_path / "demo-stage2"
    write_scores(one, (0, 0.6, 0.55), (20, 0.75))
    write_scores(two, (0, 0.8, 0.5), (36, 1.0, 0.5))
    table = demo.table_of_scores(2, two, str(one / "mm_projector.bin"))
    guess = "best guess from the question alone"
    assert [row[0] for row in cells(table)[1:4]] == ["before stage 1", "after stage 2", guess]
    assert f"Missing after stage 1: {one / 'log.jsonl'} has no such scores." in table
    table = demo.table_of_scores(2, two, None)  # from a projector of random weights
    assert [row[0] for row in cells(table)[1:3]] == ["after stage 2", guess]
    for moment in ("before", "after"):
        assert f"Missing {moment} stage 1: this run did not start from one." in table
    (one / "log.jsonl").unlink()
    assert f"Missing before stage 1: {one / 'log.jsonl'} has" in demo.table_of_scores(
        2, two, str(one / "projector.bin")
    )


def test_after_stage_1_the_table_names_the_command_of_stage_2(tmp_path):
    write_scores(tmp_path / "demo-stage1", (0, 0.6, 0.55), (40, 0.9, 0.5))
    table = demo.table_of_scores(1, tmp_path / "demo-stage1", None)
    assert cells(table)[1:3] == [["before stage 1", "60.0%", "55.0%"], ["after stage 1", "90.0%", "50.0%"]]
    assert table.endswith("\nStage 2 adds the next row: python train.py --stage 2")
    assert "Missing" not in table


@pytest.mark.slow
def test_the_readmes_commands_make_models_that_answer_held_out_questions(data, tmp_path, monkeypatch, capsys):
    """Two thirds of stage 2, without stage 1: enough to tell what is seen from what is guessed."""
    torch.set_num_threads(1)
    block = block_with("mini_llava.tools.chat outputs/demo-lora")
    commands = [shlex.split(line) for line in block.replace("\\\n", "").splitlines()]
    (tmp_path / "mini_llava").symlink_to(demo.HERE.parent)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "demo-data").symlink_to(data.images.parent)
    monkeypatch.chdir(tmp_path)
    # The demo's runs in tests/test_readme.py draw what TensorBoard shows.
    shorter = ["--eval_max_samples", "20", "--report_to", "none"]
    runs.train_here(["--stage", "2", "--max_steps", "24", *shorter])
    printed = capsys.readouterr().out
    assert "after stage 1: this run did not start from one." in printed
    assert printed.splitlines()[-1].startswith("  python -m mini_llava.tools.chat outputs/demo-stage2 --image outputs/")
    answers = []
    for program, *words in commands:
        if words[0] == "train.py":
            runs.train_here([*words[1:], "--max_steps", "4", *shorter])
            continue
        assert (program, words[0]) == ("python", "-m")
        capsys.readouterr()
        importlib.import_module(words[1]).main(words[2:])
        answers.append(capsys.readouterr().out.strip())
    assert answers[2] in ("red", "green", "blue", "yellow", "black", "gray", "brown", "teal")
    assert answers[3] in ("yes", "no")

    talk = Conversation(open_saved("outputs/demo-stage2"), torch.float32, "cpu", {"max_new_tokens": 8})
    questions, right = read(data.test)[::97], 0  # a hundred, of as many pictures
    for record in questions:
        talk.reset()
        talk.add_image(str(data.images / record["image"]))
        [(question, answer)] = turns(record)
        right += talk.ask(question.removeprefix("<image>\n")) == answer
    # 94 were, where this was written; 67 is the best guess without looking, and guessing gives 80 once in 250 times.
    assert right >= 80
