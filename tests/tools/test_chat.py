"""The chat answers from every kind of directory, with the words and pixels of the training, as transformers would."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mini_llava.tools import chat, export
from mini_llava.tools.saved_models import LORA, PROJECTOR, STATE, WHOLE, open_saved
from tests.end_to_end import runs
from tests.model.test_sources import logits

IMAGES = runs.FIXTURES / "data" / "images"
WIDE, TALL = IMAGES / "wide_rgb.png", IMAGES / "tall_rgb.png"
STEPS = {"max_steps": 3, "save_steps": 3, "learning_rate": 1e-2, "warmup_ratio": 0, "global_batch_size": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of three steps: stage 1, stage 2 into either layout, with the tower and an old template, and LoRA."""
    folder = tmp_path_factory.mktemp("runs")
    of_tower = {"unfreeze_mm_vision_tower": True, "export_format": "llava", "version": "llava_v0"}
    of_lora = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "mm_projector_lr": 1e-2}
    runs.train_here(runs.flags_of(1, folder / "projector", STEPS))
    for name, values in (("transformers", {}), ("llava", of_tower), ("lora", of_lora)):
        runs.train_here(runs.flags_of(2, folder / name, STEPS | values))
    return folder


KINDS = {
    "projector": PROJECTOR,
    "projector/checkpoint-3": PROJECTOR,
    "transformers": WHOLE,
    "transformers/checkpoint-3": STATE,
    "llava": WHOLE,
    "llava/checkpoint-3": STATE,
    "lora": LORA,
    "lora/checkpoint-3": LORA,
}


@pytest.mark.parametrize("name", KINDS)
def test_a_directory_is_known_by_what_it_holds(folder, name, tmp_path):
    saved = open_saved(str(folder / name))
    assert saved.kind == KINDS[name]
    assert saved.version == {"projector": "plain", "llava": "llava_v0"}.get(name.split("/")[0], "v1")
    assert saved.image_aspect_ratio() == ("square" if "projector" in name else "pad")
    assert saved.tower_is_own == (name.startswith("llava") or name == "transformers")


@pytest.mark.parametrize("name", ["projector", "transformers", "llava", "lora"])
def test_the_last_checkpoint_is_the_result(folder, name):
    result, state = (logits(open_saved(str(folder / part)).load()) for part in (name, f"{name}/checkpoint-3"))
    assert torch.equal(result, state)


# --- answers ---------------------------------------------------------------------------------------------------------


def conversation(directory: Path, **more) -> chat.Conversation:
    return chat.Conversation(open_saved(str(directory), **more), torch.float32, "cpu", {"max_new_tokens": 12})


def transformers_answers(directory: Path, turns: list[str], images: list[Path]) -> str:
    """What the exported model answers to the last turn, by its processor and its `generate`."""
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    messages = []
    for index, text in enumerate(turns):
        content = [{"type": "text", "text": text}]
        if index == 0:
            content = [{"type": "image"}] * len(images) + content
        messages.append({"role": ("user", "assistant")[index % 2], "content": content})
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    pictures = [Image.open(file).convert("RGB") for file in images]
    inputs = processor(text=prompt, images=pictures or None, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    return processor.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["transformers", "transformers/checkpoint-3", "lora", "projector"])
@pytest.mark.parametrize("images", [[], [WIDE], [WIDE, TALL]], ids=["no image", "an image", "two images"])
def test_two_answers_are_those_of_the_exported_model(folder, name, images, tmp_path_factory):
    exported = tmp_path_factory.getbasetemp() / f"exported {name.replace('/', ' ')}"
    if not exported.exists():
        words = ["--merge"] if name == "lora" else ["--version", "v1"]
        export.main([str(folder / name), str(exported), *words])
    talk = conversation(folder / name, version="v1")
    for file in images:
        talk.add_image(str(file))
    turns = ["What is this?"]
    first = talk.ask(turns[0])
    assert first == transformers_answers(exported, turns, images).strip()
    turns += [first, "And what else?"]
    assert talk.ask(turns[2]) == transformers_answers(exported, turns, images).strip()
    assert len(first) > 5  # something was compared


def test_the_template_is_the_one_trained_with_and_its_marks_end_an_answer(folder, capsys):
    talk = conversation(folder / "llava")
    pieces = talk.template.render(["What is this?"], [], generation_prompt=True)
    assert pieces[0][0].endswith("### Human: What is this?\n") and talk.template.stop == ("###",)
    with torch.no_grad():  # a head that says nothing but "#"
        head = talk.model.language_model.lm_head.weight
        number = talk.tokenizer.encode("##", add_special_tokens=False)[-1]
        last = talk.model.language_model.model.norm
        last.register_forward_hook(lambda *_: torch.ones(1, 1, head.shape[1]))
        head.zero_()
        head[number] = 1
    assert talk.ask("What is this?", stream=True) == "" and capsys.readouterr().out.strip() == ""


def test_a_picture_given_later_stands_first_in_its_own_turn(folder):
    talk = conversation(folder / "transformers")
    talk.ask("Hello.")
    talk.add_image(str(WIDE))
    talk.ask("What is this?")
    assert [text.count("<image>\n") for text in talk.turns[::2]] == [0, 1] and talk.turns[2].startswith("<image>\n")
    assert not talk.pending and len(talk.images) == 1


def test_turned_photographs_are_turned_upright(folder, tmp_path):
    with Image.open(WIDE) as wide:
        wide = wide.convert("RGB")
        exif = Image.Exif()
        exif[0x0112] = 6
        wide.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    talk = conversation(folder / "transformers")
    for file in (WIDE, tmp_path / "turned.png"):
        talk.add_image(str(file))
    assert (np.array(talk.pending[0]) == np.array(talk.pending[1])).all()


# --- the program -----------------------------------------------------------------------------------------------------


def test_one_shot_prints_the_answer_and_nothing_else(folder, capsys):
    words = [str(folder / "lora"), "--image", str(WIDE), "--prompt", "What is this?", "--max_new_tokens", "12"]
    capsys.readouterr()
    chat.main(words)
    talk = conversation(folder / "lora")
    talk.add_image(str(WIDE))
    assert capsys.readouterr().out == talk.ask("What is this?") + "\n"


def test_sampling_gives_other_answers_and_greedy_the_same(folder, capsys):
    words = [str(folder / "transformers"), "--prompt", "What is this?", "--max_new_tokens", "12"]
    answers = []
    for more in ([], [], ["--temperature", "5"]):
        capsys.readouterr()
        chat.main([*words, *more])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_questions_from_the_terminal_are_answered_as_they_are_written(folder, capsys, monkeypatch):
    lines = [
        "What is this?",
        f"/image {TALL}",
        "And this?",
        "/image nowhere.png",
        "/nonsense",
        "<image> again",
        "/reset",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "What is this?", "exit", "never asked"])))
    capsys.readouterr()
    chat.main([str(folder / "transformers"), "--image", str(WIDE), "--max_new_tokens", "12"])
    printed = capsys.readouterr()
    talk = conversation(folder / "transformers")
    talk.add_image(str(WIDE))
    expected = [talk.ask("What is this?")]
    talk.add_image(str(TALL))
    expected.append(talk.ask("And this?"))
    expected.append(conversation(folder / "transformers").ask("What is this?"))
    found = [line.strip() for line in printed.out.split("> ") if line.strip()]
    assert found == expected
    for sentence in ("nowhere.png", "There is no /nonsense", "marks for"):
        assert sentence in printed.err


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as caught:
        chat.main([str(word) for word in words])
    return f"{caught.value.code} {capsys.readouterr().err}"


def test_what_cannot_be_talked_to_is_refused_in_a_sentence(folder, capsys, tmp_path):
    assert "holds no model" in refused(capsys, tmp_path)
    assert "is a language model (llama), not a LLaVA model" in refused(capsys, runs.FIXTURES / "llm")
    assert "has no part in it" in refused(capsys, folder / "transformers", "--model_base", runs.FIXTURES / "llm")
    assert "nowhere.png" in refused(capsys, folder / "transformers", "--image", "nowhere.png", "--prompt", "What?")
    assert "needs an image" in refused(capsys, folder / "projector", "--prompt", "What?")
    assert "--top_p 0.5 does nothing" in refused(capsys, folder / "transformers", "--top_p", "0.5")
    (tmp_path / "run").mkdir()
    shutil.copytree(folder / "llava" / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    assert "name one of checkpoint-3" in refused(capsys, tmp_path / "run")
    for part in ("projector", "lora"):
        moved = Path(shutil.copytree(folder / part, tmp_path / part, ignore=shutil.ignore_patterns("checkpoint-*")))
        file, key = (moved / "config.json", "_name_or_path")
        if part == "lora":
            file, key = (moved / "adapter_config.json", "base_model_name_or_path")
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: "/moved/away"}))
        assert "--model_base" in refused(capsys, moved, "--prompt", "What?")
        chat.main([str(moved), "--model_base", str(runs.FIXTURES / "llm"), "--prompt", "", "--image", str(WIDE)])


def test_export_merges_adapters_only_if_asked_to(folder, capsys, tmp_path):
    for words, sentence in (
        ([folder / "lora", tmp_path / "out"], "--merge adds its adapters"),
        ([folder / "transformers", tmp_path / "out", "--merge"], "nothing to merge"),
        ([folder / "lora", folder / "lora", "--merge", "--overwrite"], "written over"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            export.main([str(word) for word in words])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["transformers", "llava"])
@pytest.mark.parametrize("name", ["lora", "transformers/checkpoint-3", "llava/checkpoint-3"])
def test_what_was_put_together_is_written_whole_in_either_layout(folder, name, layout, tmp_path):
    words = ["--merge"] if name == "lora" else []
    export.main([str(folder / name), str(tmp_path), "--export_format", layout, *words])
    written = open_saved(str(tmp_path))
    assert written.kind == WHOLE and written.version == open_saved(str(folder / name)).version
    torch.testing.assert_close(logits(written.load()), logits(open_saved(str(folder / name)).load()), rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "config.json").read_text())
    assert layout == "transformers" or config["unfreeze_mm_vision_tower"] == name.startswith("llava")
