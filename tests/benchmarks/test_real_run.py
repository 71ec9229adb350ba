"""The real run's records and scores, on packages of a few made-up pictures; nothing is fetched."""

import io
import json
import re
import shlex
import string
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.real_run import plot, prepare_data, prepare_models, score
from mini_llava import arguments as flags
from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import tokenize
from mini_llava.demo import LANGUAGE_MODEL
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.tools.chat import Conversation
from mini_llava.tools.saved_models import open_saved
from tests.end_to_end import runs
from tests.launching import ROOT

HANDS = {name: prepare_data.TRAINED_HANDS[name] for name in ("noto", "emojione", "openmoji")}
PACKAGES = {
    "noto": "iconify-json-noto-1.0.tgz",
    "emojione": "iconify-json-emojione-1.0.tgz",
    "openmoji": "openmoji-0.tgz",
    "fluent": "lobehub-fluent-emoji-3d-0.tgz",
}
INSIDE = {"openmoji": "color/svg/{}.svg", "fluent": "assets/{}.webp"}


def iconify(by_code: bool) -> dict[str, bytes]:
    """A set in Iconify's form of 40 things, with code points or known by their names alone, and one of unknown name."""
    icons = {f"thing-{n}": {"body": f'<rect fill="{n}"/>'} for n in range(40)} | {"unknown": {"body": ""}}
    if by_code:
        icons = {name.replace("thing", "drawing"): icon for name, icon in icons.items()}
    chars = {f"1f{400 + n}-fe0f": f"drawing-{n}" for n in range(40)} if by_code else {}
    files = {"package.json": {}, "icons": {"icons": icons, "width": 32, "height": 32}, "chars": chars}
    return {name if "." in name else f"{name}.json": json.dumps(value).encode() for name, value in files.items()}


def draw(svg: bytes) -> bytes:
    """A stand-in for the SVG renderer, which only preparing the real packages needs."""
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), (len(svg), 0, 0, 128)).save(file, "PNG")
    return file.getvalue()


def write_package(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as packed:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of the records, made from 40 things of 4 categories, drawn by 4 designers, and two stamps."""
    folder = tmp_path_factory.mktemp("real_run")
    (folder / "packages").mkdir()
    groups = (3, 4, 7, 9)
    entries = [
        {"hexcode": f"1F{400 + n}-FE0F", "label": f"thing {n}", "group": groups[n % 4], "tags": ["a", f"word {n}"]}
        for n in range(40)
    ]
    entries.append({"hexcode": "1F3FB", "label": "light skin tone", "group": 2})
    write_package(folder / "packages" / "emojibase-data-0.tgz", {"en/data.json": json.dumps(entries).encode()})
    for hand, name in PACKAGES.items():
        files = iconify(by_code=hand == "noto") if hand not in INSIDE else {}
        for n in range(40 if hand in INSIDE else 0):
            file = io.BytesIO()
            Image.new("RGBA", (64, 64), (6 * n, 0, 0, 128)).save(file, "WEBP")
            files[INSIDE[hand].format(f"1f{400 + n}-fe0f")] = file.getvalue() if hand == "fluent" else b"<svg/>"
        write_package(folder / "packages" / name, files | {"README.md": b"no picture"})
    for place in ("animals", "animals/cartoon"):
        (folder / "stamps" / place).mkdir(parents=True)
        for n in range(40):
            Image.new("RGB", (300, 150), "blue").save(folder / "stamps" / place / f"{n}.png")
            (folder / "stamps" / place / f"{n}.txt").write_text(f"A Thing {n}.\nfr.utf8=Une chose.\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prepare_data, "draw", draw)
        counts = prepare_data.prepare(folder / "packages", folder / "stamps", folder / "data", HANDS)
    records = {name: json.loads((folder / "data" / f"{name}.json").read_text(encoding="utf-8")) for name in counts}
    return folder / "data", records


def test_what_is_held_out_is_in_no_training_record(made):
    _, records = made
    trained = records["stage1"] + records["stage2"]
    held_out = [question for name in score.FILES for question in records[name]]
    assert not {r["image"] for r in trained} & {q["image"] for q in held_out}
    assert {r["image"].split("/")[0] for r in trained} == set(HANDS)
    unseen = {q["thing"] for q in records["new_things"]}
    assert len(unseen) == 4 and not unseen & {r["image"].split("/")[1].removesuffix(".webp") for r in trained}
    names = {q["conversations"][1]["value"] for q in records["new_things"] if q["kind"] == "name"}
    text = "; ".join(turn["value"] for r in trained for turn in r["conversations"])
    assert not {name for name in names if re.search(rf"{name}\b", text)}
    # Of the 36 others; Fluent's flags are Noto's drawings.
    flags = {q["thing"] for name in score.FILES for q in records[name] if q["conversations"][1]["value"] == "flags"}
    assert not {f"fluent/{key}.webp" for key in flags} & {q["image"] for q in held_out}
    assert {q["image"].split("/")[0] for q in records["new_hand"]} == {"fluent"}
    assert all("cartoon" not in q["image"] for q in records["photographs"]) and len(records["photographs"]) == 3 * 36


def test_a_family_is_held_out_together_and_a_number_is_no_part_of_a_name_that_has_none():
    woman, man, cat = (
        prepare_data.Thing("", name, "", ()) for name in ("woman astronaut", "man astronaut", "cat with wry smile")
    )
    assert woman.family == man.family == "astronaut" != cat.family
    assert prepare_data.letters("Keycap: 7") == "keycap7"


def test_every_record_is_one_that_the_trainer_takes(made):
    folder, records = made
    tokenizer = load_tokenizer(LANGUAGE_MODEL)
    for name, of_file in records.items():
        template = get_template("plain" if name == "stage1" else "v1")
        for record in of_file:
            picture = Image.open(folder / "images" / record["image"])
            assert picture.mode == "RGB" and picture.width == picture.height <= prepare_data.SIDE
            sample = tokenize(record, template=template, tokenizer=tokenizer, tokens_per_image=4, max_length=512)
            assert (sample.labels >= 0).any()
    yes_or_no = [
        turns[1]["value"] for r in records["stage2"] if (turns := r["conversations"])[1]["value"] in ("yes", "no")
    ]
    assert len({turns["value"] for r in records["stage2"] for turns in r["conversations"][::2]}) > 100
    assert 0.3 < yes_or_no.count("yes") / len(yes_or_no) < 0.7


def test_exchanged_pictures_show_other_things_and_only_the_right_answer_counts(made):
    questions = made[1]["new_hand"] + made[1]["new_things"]
    thing_of = {question["image"]: question["thing"] for question in questions}
    exchanged = score.exchange(questions, seed=0)
    assert all(thing_of[image] != question["thing"] for question, image in zip(questions, exchanged, strict=True))

    question = next(question for question in questions if question["kind"] == "name")
    name = question["conversations"][1]["value"]
    assert score.is_right(question, name.upper() + ".", False) and not score.is_right(question, f"a {name}", False)
    assert score.is_right(question, f"{name}. Keywords: {name}, and more", True)
    [exact, by_word] = score.score("model", "new_hand", [question] * 2, [[name, "Thing?"], ["other"] * 2], False)
    assert (exact["right"], exact["exchanged"], exact["difference"][0]) == (0.5, 0, 0.5)
    assert (by_word["kind"], by_word["right"], by_word["difference"]) == ("a word of it", 1, (1, 1, 1))
    assert "| 50.0% |" in score.table_of([exact]) and score.table_of([by_word]).endswith("|  |")


def test_the_interval_covers_the_truth_as_often_as_it_says_also_if_questions_about_a_thing_agree():
    generator = np.random.default_rng(0)
    things = [str(thing) for thing in range(60) for _ in range(4)]
    covered, widths = [], []
    for seed in range(100):
        values = np.repeat(generator.random(60) < 0.3, 4).astype(float)  # all four questions right, or none
        _, low, high = score.interval(values, things, seed, resamples=400)
        covered.append(low <= 0.3 <= high)
        widths.append(high - low)
    # 95 are expected; three standard deviations are 7, and a bootstrap over 60 things is a little narrow.
    assert sum(covered) >= 87
    assert np.mean(widths) == pytest.approx(
        2 * 1.96 * (0.3 * 0.7 / 60) ** 0.5, rel=0.05
    )  # 60 things, not 240 questions


def test_the_towers_weights_get_timms_names():
    widened = {f"_blocks.{number}._expand_conv.weight": None for number in range(1, sum(prepare_models.BLOCKS))}
    for there, timms in (
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_bn1.running_var", "bn2.running_var"),
        ("_blocks.0._depthwise_conv.weight", "blocks.0.0.conv_dw.weight"),
        ("_blocks.0._bn2.bias", "blocks.0.0.bn2.bias"),
        ("_blocks.1._bn2.bias", "blocks.1.0.bn3.bias"),
        ("_blocks.4._bn0.weight", "blocks.2.0.bn1.weight"),
        ("_blocks.20._project_conv.weight", "blocks.6.0.conv_pwl.weight"),
    ):
        assert prepare_models.timm_name(there, widened) == timms


def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has 0 files emojibase-data-\*.tgz, and one is needed: README.md"):
        prepare_data.prepare(tmp_path, None, tmp_path / "data")


def test_samples_are_drawn_and_not_chosen(made):
    asked = {"new_hand": made[1]["new_hand"]}
    answers = {"new_hand": {"model": {question["id"]: ("a|b", "") for question in asked["new_hand"]}}}
    table = score.samples_of(asked, answers, 3).splitlines()
    assert len(table) == 5 and all(line.count("|") == 5 and "a/b" in line for line in table[2:])
    assert table == score.samples_of(asked, answers, 3).splitlines()


def test_the_examples_picture_has_room_for_all_its_texts(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    about = dict(images=["a.png"], question="What does the picture show? Answer briefly.", expected="long " * 12)
    lines = [
        about | dict(step=step, record=f"record {record}", answer="longer " * 9, right=bool(step))
        for step in (0, 7)
        for record in range(3)
    ]
    (tmp_path / "eval_samples.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    figure = plot.draw_examples({"one": tmp_path, "another": tmp_path}, tmp_path)
    texts = [text for axis in figure.axes for text in axis.texts]
    assert len(texts) == 3 * 5
    for text in texts:
        corners = text.get_window_extent().get_points()
        assert (corners >= 0).all() and (corners <= figure.bbox.size).all(), text.get_text()


def test_the_page_has_commands_that_the_trainer_takes():
    page = (ROOT / "benchmarks" / "real_run" / "README.md").read_text(encoding="utf-8")
    script = page.split("```bash\n")[1].split("```")[0].replace("\\\n", " ")
    variables = {name: " ".join(value.split()) for name, value in re.findall(r'^(\w+)="(.*?)"$', script, re.M | re.S)}
    commands = [string.Template(line).substitute(variables) for line in re.findall(r"^python train.py.*", script, re.M)]
    stages = [flags.parse_arguments(shlex.split(command)[2:]).stage for command in commands]
    assert stages == [1, 1, 2, 2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directory of a projector after one step of stage 1."""
    directory = tmp_path_factory.mktemp("trained") / "stage1"
    runs.train_here(runs.flags_of(1, directory, {"max_steps": 1, "warmup_ratio": 0, "save_strategy": "no"}))
    return directory


def test_models_and_nearest_pictures_are_scored(made, trained, tmp_path):
    folder, records = made
    models = [f"asked={trained}:v1", f"captions={trained}"]
    options = ["--data", str(folder), "--output", str(tmp_path / "scores.json"), "--max_things", "3", "--samples", "1"]
    command = [sys.executable, "-m", "benchmarks.real_run.score", *models, *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4_000:]
    written = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    kinds = {}
    for row in written["scores"]:
        kinds.setdefault((row["model"], row["file"]), []).append(row["kind"])
        assert score.table_of([row]).splitlines()[-1] in run.stdout
    names = ["name", "a word of it"]
    wanted = {"asked": ["name", "category", "yes_no", "a word of it"], "captions": names}
    wanted["nearest training picture"] = names
    assert kinds == {(model, file): of for model, of in wanted.items() for file in score.FILES}
    for file in score.FILES:
        asked = {question["id"] for question in records[file]}
        assert written["answers"][file].keys() == {"asked", "captions"}
        assert all(answered.keys() <= asked for answered in written["answers"][file].values())
    assert re.search(r"asked: \d+ answers about photographs in [\d.]+ s\.", run.stdout)


def test_a_single_thing_cannot_be_asked_about(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["score.py", "a=b", "--data", "c", "--output", "d", "--max_things", "1"])
    with pytest.raises(SystemExit):
        score.main()
    assert "--max_things 1 is too few" in capsys.readouterr().err


def test_many_questions_at_once_get_the_answers_that_one_gets(made, trained):
    folder, records = made
    conversation = Conversation(
        open_saved(str(trained), version="v1"),
        torch.float32,
        "cpu",
        {"max_new_tokens": score.LONGEST_ANSWER},
    )
    questions = records["new_hand"][:21:3]
    pictures = [question["image"] for question in questions]
    opened_as = score.open_pictures(conversation, folder / "images", pictures)
    at_once = score.ask(conversation, questions, pictures, opened_as, batch_size=4)
    for question, answer in zip(questions, at_once, strict=True):
        conversation.reset()
        conversation.add_image(str(folder / "images" / question["image"]))
        assert conversation.ask(question["conversations"][0]["value"]) == answer
    assert score.nearest(conversation, pictures, pictures[::-1], opened_as) == pictures[::-1]
