"""What looks like media or a prompt and is not read makes a bad record; what says where a picture is from does not."""

import json
import re
import time

import pytest

from mini_llava.data.templates import BadRecord, get_template
from mini_llava.data.tokenization import tokenize
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.guards.records import RecordCheck
from mini_llava.tools import tour
from tests.end_to_end import runs

V1 = get_template("v1")


@pytest.fixture(scope="module")
def llama():
    return load_tokenizer(runs.FIXTURES / "tokenizer_llama")


def ids(record, tokenizer, left_unread=()):
    """The ids of a record that the check lets pass."""
    return tokenize(RecordCheck(left_unread)(record), V1, tokenizer, 4, 1000).input_ids.tolist()


def conversation(question="What?", **keys):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "A ball."}]
    return {"id": "0", **keys, "conversations": turns}


def with_image(question="<image>\nWhat?", **keys):
    return conversation(question, image="a.png", **keys)


BASE64 = "/9j/4AAQSkZJRgABAQAAAQABAAD"
MEDIA = {
    # LLaMA-Factory, ms-swift, Mantis; LLaVA-Video, Video-LLaVA; ShareGPT4Video; InternVL; SpatialBot; PointLLM
    **{
        f"{key}, a list": conversation(**{key: ["a.png"]}) for key in ("images", "videos", "audios", "Images", "frames")
    },
    **{f"{key}, a name": conversation(**{key: "v"}) for key in ("video", "audio", "speech", "depth", "point_cloud")},
    **{f"{key}, beside an image": with_image(**{key: "x"}) for key in ("video", "images", "depth_map", "image_2")},
    "one of several images": conversation(image_1="a.png"),
    "a path of a video": with_image(video_path="/data/v.mp4"),
    "bytes as datasets has them": conversation(images=[{"bytes": BASE64, "path": None}]),
    # under any other key, by what it is
    "an image file": conversation(picture="coco/a.JPG"),
    "image files": conversation(files=["a.png", "b.png"]),
    "a video file": conversation(clip="v.mp4"),
    "an address": conversation(image_url="https://example.com/a.jpg?size=3"),
    "a data URI": conversation(media="data:image/png;base64,iVBORw0KGgo="),
    "base64": conversation(picture=BASE64),
    "an object": conversation(media=[{"type": "image", "path": "a.png"}]),
    "points": conversation(scan="scene/0001.ply"),
    "a key that ends as one of an id": conversation(vid="clips/a.mp4"),
}
PROMPTS = {key: with_image(**{key: "Be short."}) for key in ("sys", "system_prompt", "System", "tools")}
IN_A_TURN = with_image()
IN_A_TURN["conversations"][0]["image"] = "b.png"


@pytest.mark.parametrize("name", MEDIA)
def test_media_under_another_key_are_named(name, llama):
    [key] = MEDIA[name].keys() - {"id", "image", "conversations"}
    sentence = re.escape(f"its key '{key}' looks like media and is not read: ") + f".* with --leave_unread {key}\\.$"
    with pytest.raises(BadRecord, match=sentence):
        ids(MEDIA[name], llama)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_under_another_key_are_named(name, llama):
    with pytest.raises(BadRecord, match=f"its key '{name}' looks like a prompt and is not read: "):
        ids(PROMPTS[name], llama)


def test_an_image_in_a_turn_is_named(llama):
    with pytest.raises(BadRecord, match=r"its key 'image' looks like media .* only from the record's 'image'"):
        ids(IN_A_TURN, llama)


NOT_MEDIA = {
    "sizes": with_image(image_size=[640, 480], width=640, height=480, width_list=[640]),
    "where it is from": with_image(image_url="https://x.org/a.jpg", url="https://x.org/a.jpg", image_path="/raw/a.jpg"),
    "a name before it was renamed": with_image(original_image="b.png", file_name="b.png", image_id="b.png"),
    "its source": with_image(data_source="coco", dataset="x", image_source="coco/a.jpg", source="b.png"),
    "other notes": with_image(metric="choice", score=0.3, model="", lang="en", metadata={"split": "train"}),
    "nothing as text": conversation(tools="[]", functions="{}", system=" ", images=["null"]),
    "a question about files": conversation(title="How do I convert HEIC to .jpg?", note="What opens a.mp4?"),
    "nothing": conversation(images=[], video=None, system="", audio={}, videos=[""], frames=[None]),
    "boxes, points, seconds": with_image(depth=3.5, frames=[0, 8], points=[[1, 2]], depths=[[1.5]], video=7),
    "an image of a text": conversation(image_id="coco/1.jpg"),
    "a page": conversation(url="https://x.org/a.html", source="sharegpt", note="It is in\na.png"),
    "another name of the same": conversation(systematic="yes", toolset="x", video_id="v.mp4"),
}


@pytest.mark.parametrize("name", NOT_MEDIA)
def test_sizes_sources_and_empty_values_change_nothing(name, llama):
    record = NOT_MEDIA[name]
    read = {key: record[key] for key in record.keys() & {"image", "conversations"}}
    assert ids(record, llama) == ids(read, llama)


MARKS = {
    "<video>": ["<video>\nWhat happens?", "What happens?\n<video>", "  <video>Why?", "First\n <video> \nthen?"],
    "<audio>": ["<audio>\nWhat is said?", "<audio><video>What?"],
    "[IMG]": ["[IMG]\nWhat?"],
    "<point>": ["<point>\nWhat is this object?"],
    "<image_placeholder>": ["<image_placeholder>What?", "What is in <image_placeholder>?"],
    "<image-placeholder>": ["<image-placeholder>\nWhat?"],
    "<image_1>": ["What differs between <image_1> and <image_2>?"],
    "<image 1>": ["In <image 1>, what?"],
    "<ImageHere>": ["<Img><ImageHere></Img>What?"],
    "<Image>": ["<Image>\nWhat?", "What?\n<Image>"],
    "<IMAGE>": ["<IMAGE> What?"],
    "<|image_pad|>": ["A: <|image_pad|>"],
    "<|vision_start|>": ["<|vision_start|><|image_pad|><|vision_end|>What?"],
    "<|image_1|>": ["<|image_1|>\nWhat?"],
    "<|video|>": ["See <|video|>."],
    "<IMG_CONTEXT>": ["<img><IMG_CONTEXT></img>\nWhat?"],
    "<start_of_image>": ["<start_of_image> What?"],
    "<img>a/b.jpg</img>": ["Picture 1: <img>a/b.jpg</img>\nWhat?"],
}


@pytest.mark.parametrize("mark, question", [(mark, text) for mark, texts in MARKS.items() for text in texts])
def test_another_models_mark_in_a_question_is_named_and_let_pass_by_name(mark, question, llama):
    for record in (conversation(question), with_image(f"<image>\n{question}")):
        with pytest.raises(BadRecord, match=re.escape(f"has the mark {mark!r}, which is not read: ")):
            ids(record, llama)
    others = [other for other in MARKS if other in question] + ["<|vision_end|>", "<video>"]
    assert ids(conversation(question), llama, others)


ABOUT_HTML = [
    "How do I use the <video> tag in HTML?",
    "What does <img> do, and what <audio>?",
    "Fix this:\n<video>\n<source src='a.mp4'>\n</video>",
    "<audio>\nhello\n</audio>\nIs this valid?",
    'Why is <img src="a.png"> not shown?',
    "[IMG]http://x.org/a.png[/IMG] is BBCode, is it?",
    "Is a[image] or x[img] right? And <|im_start|>, <s>, <b>, i<img>j?",
    "<Image><Text>x</Text></Image> is which framework's?",
    "The <imaginary> and the <videos of cats>",
]


@pytest.mark.parametrize("question", ABOUT_HTML)
def test_a_question_about_html_is_a_text(question, llama):
    assert ids(conversation(question), llama)


def test_an_answer_may_hold_any_mark_but_ours(llama):
    record = conversation("Write HTML.")
    record["conversations"][1]["value"] = "<video>\n<|image_pad|> <image_1> [IMG]"
    assert ids(record, llama)


def test_what_is_left_unread_is_as_if_it_were_not_there(llama):
    named = ["images", "system", "image_1"]
    turn = conversation()
    turn["conversations"].insert(0, {"from": "system", "value": "Be short."})
    assert ids(turn, llama, named) == ids(conversation(), llama) != ids(turn, llama)
    for keys in ({"images": ["a.png"], "system": "Be short."}, {"image_7": "a.png"}):
        assert ids(conversation(**keys), llama, named) == ids(conversation(), llama)
    with pytest.raises(BadRecord, match=r"its key 'video' .* with --leave_unread video '<video>'\.$"):
        ids(conversation("<video>\nWhat?", images=["a.png"], video="v"), llama, named)


HOSTILE = {
    "marks": conversation("<video>" * 100_000),
    "lines of marks": conversation("<video>\n" * 100_000 + "</video>"),
    "openings": conversation("<img>" * 700_000),
    "brackets": conversation("<" * 1_000_000 + "[" * 1_000_000),
    "blanks": conversation(" " * 3_900_000 + "<video>"),
    "keys": conversation(**{f"image{number}x": "a" for number in range(50_000)}),
    "a long key": conversation(**{"image_" * 1_000_000: "a" * 1_000_000}),
    "a long value": conversation(note="a." * 2_000_000, system=[[[[[["x"]]]]]]),
    "a deep value": conversation(video=json.loads("[" * 500 + "]" * 500)),
    "a wide value": conversation(video=[[[0] * 1000] * 1000] * 1000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_record_takes_no_time(name):
    """Linear in its length: a second or two of megabytes, of which what is quadratic would take hours."""
    record = HOSTILE[name]
    start = time.process_time()
    for _ in RecordCheck(["<video>"]).unread(record):
        pass
    assert time.process_time() - start < 20


# --- the programs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unread")
    good = json.loads((runs.FIXTURES / "data" / "train_stage2.json").read_text(encoding="utf-8"))[:8]
    blind = [conversation(images=["wide_rgb.png"]), conversation("<video>\nWhat?", video="v.mp4")]
    (folder / "good.json").write_text(json.dumps(good))
    (folder / "blind.json").write_text(json.dumps([*good[:2], *blind, conversation(tools="Be short.")]))
    return folder


ALL = ["images", "video", "<video>", "tools"]


def train(files, name, **values):
    one_step = {"max_steps": 1, "warmup_ratio": 0, "global_batch_size": 4, "save_strategy": "no"}
    values = {**one_step, "data_path": files / "blind.json", **values}
    runs.train_here(runs.flags_of(2, files / name, values))


def test_training_names_them_before_step_1_and_trains_without_what_is_named(files):
    with pytest.raises(BadRecord) as refused:
        train(files, "refused")
    sentences = str(refused.value).splitlines()
    assert sentences[0].startswith("3 of 5 records cannot be trained on")
    for name in ("images", "video", "tools"):
        assert any(f"its key '{name}' looks like" in sentence for sentence in sentences)
    assert not (files / "refused" / "log.jsonl").exists()
    with pytest.raises(BadRecord, match=r"has the mark '<video>'.*--leave_unread '<video>'"):
        train(files, "refused", leave_unread=ALL[:2] + ALL[3:])
    train(files, "named", leave_unread=ALL)
    assert len(runs.log(files / "named")) == 1


def test_held_out_records_are_looked_at_too(files):
    held_out = {"data_path": files / "good.json", "eval_data_path": files / "blind.json"}
    held_out |= {"eval_image_folder": runs.FIXTURES / "data" / "images"}
    with pytest.raises(BadRecord, match=r"(?s)--eval_data_path: 3 of 5 records .*its key 'images' looks like media"):
        train(files, "held out", **held_out)


def test_the_tour_takes_the_flag(files, capsys):
    words = runs.flags_of(2, files / "tour", {"data_path": files / "blind.json"})
    assert tour.main([*words, "--record", "3"]) == 2
    assert "its key 'video' looks like media" in capsys.readouterr().err
    assert tour.main([*words, "--record", "3", "--leave_unread", *ALL]) == 0
