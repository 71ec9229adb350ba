"""Labels are known by construction, images are counted, and nothing is silently masked."""

import json
import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, LlavaProcessor

from mini_llava.data.records import RecordStore
from mini_llava.data.templates import TEMPLATES, BadRecord, get_template
from mini_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, tokenize, tokenize_prompt
from mini_llava.formats.tokenizers import image_token_tokenizer, load_tokenizer
from mini_llava.formats.towers import load_image_processor
from mini_llava.guards.records import MAX_IMAGES, RecordCheck

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
RECORDS = json.loads((FIXTURES / "data" / "records.json").read_text(encoding="utf-8"))
V1 = get_template("v1")


@pytest.fixture(scope="module")
def llama():
    return load_tokenizer(FIXTURES / "tokenizer_llama")


@pytest.fixture(scope="module")
def tokenizers(llama, tmp_path_factory):
    """A Llama-style tokenizer, a byte-level one without chat marks, and one with all of them and with BOS."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in ("bytes", "chat"):
        shutil.copytree(FIXTURES / "tokenizer_qwen", folder / name)
    backend = json.loads((folder / "bytes" / "tokenizer.json").read_text(encoding="utf-8"))
    backend["added_tokens"] = backend["added_tokens"][:1]
    (folder / "bytes" / "tokenizer.json").write_text(json.dumps(backend), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (folder / "bytes" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "bytes" / "special_tokens_map.json").unlink()

    chat = load_tokenizer(folder / "chat")
    marks = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "</s>", "<s>"]
    chat.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    chat.bos_token = "<|begin_of_text|>"
    chat.add_bos_token = True
    assert chat("").input_ids == [chat.bos_token_id]
    return {"llama": llama, "bytes": load_tokenizer(folder / "bytes"), "chat": chat}


def conversation(*turns, **keys):
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[i % 2], "value": turn} for i, turn in enumerate(turns)], **keys}


def trained_runs(sample):
    """The ids of each stretch of neighbouring trained tokens."""
    trained = np.flatnonzero(sample.labels != IGNORE_INDEX)
    return [sample.input_ids[run] for run in np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1)]


def decode(tokenizer, ids):
    """Decode without losing a leading blank, which a Llama decoder takes for its own."""
    before = tokenizer("x", add_special_tokens=False).input_ids
    return tokenizer.decode([*before, *ids])[len(tokenizer.decode(before)) :]


# --- labels ----------------------------------------------------------------------------------------------------------

SEPARATORS = [
    "</s>",
    "<s>",
    "###",
    " ASSISTANT: ",
    "USER: ",
    "[/INST] ",
    "[INST]",
    "<|im_end|>\n",
    "<|im_start|>user\n",
]
SEPARATORS += ["<|eot_id|>", "\n### Human: ", "<unk>", "\n", "\n\n", "  ", " ", "\t", "🦙", "猫", "<image", "<Image"]
# U+2581 is how Llama writes a blank, so it cannot come back as itself.
CHARACTERS = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="▁"), max_size=8)
TEXTS = st.lists(st.sampled_from(SEPARATORS) | CHARACTERS, max_size=5).map("".join)
TEXTS = TEXTS.filter(lambda text: "<image>" not in text)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
@pytest.mark.parametrize("tokenizer_name", ["llama", "bytes", "chat"])
def test_the_trained_tokens_are_the_answers_and_their_end_marks(tokenizer_name, tokenizers, rounds):
    tokenizer = tokenizers[tokenizer_name]
    for template in TEMPLATES.values():
        if template.captions_only:
            expected = [rounds[0][1] + "\n"]
            record = conversation("<image>", rounds[0][1], image="a.png")
        else:
            expected = [template.answer_lead + answer + template.answer_end for _, answer in rounds]
            record = conversation(*(turn for round in rounds for turn in round))
        sample = tokenize(record, template, tokenizer, 4, 100_000)
        runs = trained_runs(sample)
        assert len(runs) == len(expected)
        for ids, text in zip(runs, expected, strict=True):
            decoded = decode(tokenizer, ids)
            if tokenizer_name == "llama" and template.captions_only:
                # Its blank in front of every text, here the text after the image, is part of the caption, as in LLaVA.
                decoded = decoded.removeprefix(" ")
            at = decoded.find(text)
            assert at >= 0, (template.name, decoded, text)
            # A token may reach across the border of the answer; then it, and no other, brings foreign characters.
            assert at == 0 or at < len(decode(tokenizer, ids[:1])), (template.name, decoded, text)
            beyond = len(decoded) - at - len(text)
            assert beyond == 0 or beyond < len(decode(tokenizer, ids[-1:])), (template.name, decoded, text)


def test_a_token_that_reaches_into_the_answer_is_trained(tokenizers):
    """After `assistant` and a newline, an answer that begins with a newline shares the token of two newlines."""
    sample = tokenize(conversation("Hi", "\nyes"), get_template("qwen_2"), tokenizers["bytes"], 1, 1000)
    (run,) = trained_runs(sample)
    assert decode(tokenizers["bytes"], run).lstrip("\n") == "yes<|im_end|>"


def test_a_turn_that_contains_the_end_mark_keeps_its_labels(llama):
    """LLaVA splits the text at </s>, loses count and masks the whole sample."""
    sample = tokenize(conversation("How does it end?", "With </s> and then more."), V1, llama, 1, 1000)
    (run,) = trained_runs(sample)
    assert decode(llama, run) == " With </s> and then more.</s>"


def test_unknown_tokens_in_the_text_are_not_taken_for_padding(llama):
    assert llama.pad_token_id == llama.unk_token_id
    sample = tokenize(conversation("What is it?", "It is <unk>."), V1, llama, 1, 1000)
    assert llama.unk_token_id in sample.labels


def test_a_last_question_without_answer_stays_untrained(llama):
    answered = tokenize(conversation("Hello", "Hi"), V1, llama, 1, 1000)
    open_ended = tokenize(conversation("Hello", "Hi", "And?"), V1, llama, 1, 1000)
    assert len(open_ended.input_ids) > len(answered.input_ids)
    assert open_ended.labels[: len(answered.labels)].tolist() == answered.labels.tolist()
    assert (open_ended.labels[len(answered.labels) :] == IGNORE_INDEX).all()


def test_ids_and_labels_are_int32(llama):
    sample = tokenize(RECORDS[0], V1, llama, 3, 1000)
    assert sample.input_ids.dtype == sample.labels.dtype == tokenize_prompt(RECORDS[0], V1, llama, 3).dtype == np.int32


def test_truncation_or_padding_left_on_in_the_tokenizer_does_not_matter(llama):
    tokenizer = load_tokenizer(FIXTURES / "tokenizer_llama")
    expected = tokenize(RECORDS[0], V1, llama, 1, 1000).input_ids.tolist()
    tokenizer(["a b c d"], truncation=True, max_length=3, padding="max_length")
    assert tokenize(RECORDS[0], V1, tokenizer, 1, 1000).input_ids.tolist() == expected


def test_tokens_added_later_are_seen():
    tokenizer = load_tokenizer(FIXTURES / "tokenizer_llama")
    record = conversation("Hi", "a <mark> b")
    tokenize(record, V1, tokenizer, 1, 1000)
    tokenizer.add_tokens(["<mark>"])
    assert tokenizer.convert_tokens_to_ids("<mark>") in tokenize(record, V1, tokenizer, 1, 1000).input_ids


# --- images ----------------------------------------------------------------------------------------------------------


def test_an_image_given_as_a_string_moves_to_the_front_of_its_turn(llama):
    at_the_end = tokenize(conversation("What is this?\n<image>", "A cat.", image="a.png"), V1, llama, 5, 1000)
    at_the_front = tokenize(conversation("<image>\nWhat is this?", "A cat.", image="a.png"), V1, llama, 5, 1000)
    assert at_the_end.input_ids.tolist() == at_the_front.input_ids.tolist()
    assert np.count_nonzero(at_the_end.input_ids == IMAGE_TOKEN_INDEX) == 5


def test_images_given_as_a_list_stay_in_place_and_in_order(llama):
    record = conversation("This <image> or <image>?", "The first.", "And <image>?", "No.", image=["a", "b", "c"])
    sample = tokenize(record, V1, llama, 2, 1000)
    places = np.flatnonzero(sample.input_ids == IMAGE_TOKEN_INDEX)
    assert len(places) == 6 and places[2] - places[1] > 1
    assert sample.images == ["a", "b", "c"]
    assert (sample.labels[places] == IGNORE_INDEX).all()


def test_mmtag_templates_wrap_the_image(llama):
    template = get_template("v1_mmtag")
    sample = tokenize(conversation("<image>\nWhat?", "A cat.", image="a.png"), template, llama, 2, 1000)
    place = int(np.argmax(sample.input_ids == IMAGE_TOKEN_INDEX))
    assert llama.decode(sample.input_ids[:place]).endswith("USER: <Image>")
    assert llama.decode(sample.input_ids[place + 2 :]).startswith("</Image>\nWhat?")


SYSTEM = {"from": "system", "value": "Be short."}


@pytest.mark.parametrize("name", sorted({template.name for template in TEMPLATES.values()}))
def test_a_records_own_system_prompt_takes_the_templates_place(name, tokenizers):
    tokenizer, template = tokenizers["chat"], get_template(name)
    keyed = conversation("<image>\nHi", "Yes", image="a.png", system="Be short.")
    turn = conversation("<image>\nHi", "Yes", image="a.png")
    plain = tokenize(turn, template, tokenizer, 2, 1000)
    turn["conversations"].insert(0, SYSTEM)
    if not template.system:
        with pytest.raises(BadRecord, match=rf"the template {name} has no place for one: .*\bv1\b"):
            tokenize(keyed, template, tokenizer, 2, 1000)
        return
    own, same = (tokenize(record, template, tokenizer, 2, 1000) for record in (keyed, turn))
    assert own.input_ids.tolist() == same.input_ids.tolist() and own.labels.tolist() == same.labels.tolist()
    texts = [tokenizer.decode(ids[ids >= 0]) for ids in (plain.input_ids, own.input_ids)]
    assert template.system in texts[0] and texts[0].replace(template.system, "Be short.") == texts[1]
    assert [trained_runs(own)[0].tolist()] == [run.tolist() for run in trained_runs(plain)]
    asked = tokenize_prompt(keyed, template, tokenizer, 2).tolist()
    assert own.input_ids.tolist()[: len(asked)] == asked


@pytest.mark.parametrize(
    "record, sentence",
    [
        (conversation("What?", "A cat.", image="a.png"), "it has 0 <image> marks for 1 image;"),
        (conversation("<image><image>", "A cat.", image="a.png"), "it has 2 <image> marks for 1 image;"),
        (conversation("<image>", "A cat.", image=["a.png", "b.png"]), "it has 1 <image> mark for 2 images;"),
        (conversation("What is <image>?", "A mark."), "it has 1 <image> mark for 0 images;"),
        (conversation("Draw!", "Here: <image>", image="a.png"), "an answer contains <image>"),
        (conversation("<image>", "A cat.", image=None), "it has 1 <image> mark for 0 images;"),
        (conversation("<image>", "A cat.", image=0), "its 'image' is 0"),
        (conversation("<image><image>", "A cat.", image=["a.png", ""]), "its 'image' is ['a.png', '']"),
        (conversation("<image>", "A cat.", image=["a.png", 3]), "its 'image' is ['a.png', 3]"),
        (conversation(), "it has no list 'conversations'"),
        ({"text": "A cat."}, "it has no list 'conversations'"),
        ({"conversations": [{"from": "human"}]}, "turn 1 is not an object with a 'from' and a text 'value'"),
        ({"conversations": [{"from": "tool", "value": "Hi"}]}, "turn 1 is from 'tool'"),
        ({"conversations": [{"from": "system", "value": "Hi"}]}, "it has no human turn"),
        ({"conversations": [*conversation("Hi", "Yes")["conversations"], SYSTEM]}, "turn 3 is from 'system'; a system"),
        (conversation("Hi", "Yes", system=["Be short."]), "its 'system' is ['Be short.']; expected a text"),
        (conversation("Hi", "Yes", system="See <image>."), "its system prompt contains <image>"),
        (
            {"system": "Be kind.", "conversations": [SYSTEM, *conversation("Hi", "Yes")["conversations"]]},
            "it has two system prompts",
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}] * 2}, "two turns of 'human' follow each other"),
        ({"conversations": [{"from": "gpt", "value": "Hi"}]}, "it has no human turn"),
        (conversation("Anybody there?"), "no question has an answer"),
    ],
)
def test_a_bad_record_is_named_in_a_sentence(record, sentence, llama):
    with pytest.raises(BadRecord, match=re.escape(sentence)):
        tokenize(record, V1, llama, 4, 1000)


@pytest.mark.parametrize("nothing", [None, "", [], [""]], ids=repr)
def test_an_empty_image_is_none(nothing, llama, tmp_path):
    text, record = conversation("Hi", "A red ball."), conversation("Hi", "A red ball.", image=nothing)
    RecordCheck()(record)
    sample, same = (tokenize(each, V1, llama, 4, 1000) for each in (record, text))
    assert sample.input_ids.tolist() == same.input_ids.tolist() and sample.images == []
    with pytest.raises(BadRecord, match="its key 'photo' looks like media"):  # as of any record without an image
        RecordCheck()(record | {"photo": "a.png"})
    (tmp_path / "records.json").write_text(json.dumps([record]), encoding="utf-8")
    assert RecordStore([str(tmp_path / "records.json")]).image_names(0) == []


def test_plain_wants_an_image_and_its_caption(llama):
    plain = get_template("plain")
    with pytest.raises(BadRecord, match="needs an image"):
        tokenize(conversation("Describe it.", "A cat."), plain, llama, 4, 1000)
    with pytest.raises(BadRecord, match=r"found 4 turns\."):
        tokenize(conversation("<image>", "A cat.", "More?", "No.", image="a.png"), plain, llama, 4, 1000)


# --- length ----------------------------------------------------------------------------------------------------------


def test_truncation_counts_image_tokens_and_keeps_the_head(llama):
    whole = tokenize(RECORDS[0], V1, llama, 50, 10_000)
    cut = tokenize(RECORDS[0], V1, llama, 50, len(whole.input_ids) - 2)
    assert cut.input_ids.tolist() == whole.input_ids[:-2].tolist()
    assert cut.labels.tolist() == whole.labels[:-2].tolist()


def test_an_image_is_never_cut_in_two(llama):
    record = conversation("First <image>", "one", "Second <image>", "two", image=["a.png", "b.png"])
    whole = tokenize(record, V1, llama, 10, 10_000)
    second = np.flatnonzero(whole.input_ids == IMAGE_TOKEN_INDEX)[10]
    for max_length in range(second, second + 10):
        cut = tokenize(record, V1, llama, 10, max_length)
        assert len(cut.input_ids) == second and cut.images == ["a.png"]
    assert tokenize(record, V1, llama, 10, second + 10).images == ["a.png", "b.png"]


def test_a_record_whose_answers_are_cut_off_is_bad_and_says_why(llama):
    with pytest.raises(
        BadRecord, match=r"has 152 tokens .* first trained token is at position 146, .* is 100: nothing"
    ):
        tokenize(RECORDS[0], V1, llama, 51, 100)


MILLION = 10**6
HUGE = {
    "a million images": conversation("<image>" * MILLION, "Many.", image=["a.png"] * MILLION),
    "one image, a million marks": conversation("<image>" * MILLION, "Many.", image="a.png"),
    "a million images, one mark": conversation("<image>", "Many.", image=["a.png"] * MILLION),
    "an endless text": conversation("What? " * MILLION, "Nothing."),
    "many endless texts": conversation(*["What? " * 1000] * 1000),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_record_is_refused_before_ids_are_made_of_it(name, llama):
    """Ids of the first would take 2.3 GB. 32 MB is four copies of its text."""
    tracemalloc.start()
    try:
        with pytest.raises(BadRecord, match=r"more than .* are refused|it has 1 <image> mark for 1,000,000 images"):
            RecordCheck()(HUGE[name])
            tokenize(HUGE[name], V1, llama, 576, 2048)
        assert tracemalloc.get_traced_memory()[1] < 32e6
    finally:
        tracemalloc.stop()


def test_as_many_images_as_are_allowed_are_cut_like_any_others(llama):
    record = conversation("<image>" * MAX_IMAGES + "What?", "Many.", image=["a.png"] * MAX_IMAGES)
    RecordCheck()(record)
    with pytest.raises(BadRecord, match="nothing to train on is left"):
        tokenize(record, V1, llama, 576, 2048)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_ends_with_the_role_and_keeps_earlier_answers(llama):
    record = conversation("<image>\nWhat?", "A cat.", "Which colour?", "Grey.", image="a.png")
    prompt = tokenize_prompt(record, V1, llama, 2)
    text = llama.decode(prompt[prompt >= 0])
    assert text.endswith("ASSISTANT: A cat.</s>USER: Which colour? ASSISTANT:")


def test_an_unanswered_question_and_an_answered_one_have_the_same_prompt(tokenizers):
    for name, tokenizer in tokenizers.items():
        for template in TEMPLATES.values():
            answered = conversation("<image>\nWhat?", "A cat.", image="a.png")
            if not template.captions_only:
                asked = conversation("<image>\nWhat?", image="a.png")
                expected = tokenize_prompt(answered, template, tokenizer, 2).tolist()
                assert tokenize_prompt(asked, template, tokenizer, 2).tolist() == expected, (name, template.name)
            sample = tokenize(answered, template, tokenizer, 2, 1000)
            prompt = tokenize_prompt(answered, template, tokenizer, 2)
            assert sample.input_ids[: len(prompt)].tolist() == prompt.tolist(), (name, template.name)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_other_tokenizers_are_loaded_as_they_are(tokenizers):
    reference = AutoTokenizer.from_pretrained(FIXTURES / "tokenizer_qwen")
    loaded = load_tokenizer(FIXTURES / "tokenizer_qwen")
    assert type(loaded) is type(reference)
    assert loaded.backend_tokenizer.to_str() == reference.backend_tokenizer.to_str()


def splits_digits(folder, tokenizer_class="GPT2Tokenizer", model_type="llama"):
    """A byte-level tokenizer as SmolLM2 and Granite have it."""
    shutil.copytree(FIXTURES / "tokenizer_qwen", folder)
    configure(folder, tokenizer_class=tokenizer_class)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    file = folder / "tokenizer.json"
    pipeline = json.loads(file.read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    pipeline["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, pipeline["pre_tokenizer"]]}
    file.write_text(json.dumps(pipeline), encoding="utf-8")
    return folder


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "llava_qwen2", "granite"])
@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_text_is_cut_as_tokenizer_json_says_whatever_the_class_is_called(tokenizer_class, model_type, tmp_path):
    folder = splits_digits(tmp_path / "tokenizer", tokenizer_class, model_type)
    text = "It was 650841823 in 2023."
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False)
    assert sum(token.strip("Ġ").isdigit() for token in expected.tokens) == 13  # each by itself
    tokenizer = load_tokenizer(folder)
    assert tokenizer(text, add_special_tokens=False).input_ids == expected.ids
    assert tokenizer.eos_token == load_tokenizer(FIXTURES / "tokenizer_qwen").eos_token


@pytest.fixture
def llama_folder(tmp_path):
    shutil.copytree(FIXTURES / "tokenizer_llama", tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def configure(folder, **changes):
    file = folder / "tokenizer_config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


@pytest.mark.parametrize("keep", ["tokenizer.json", "tokenizer.model"])
def test_a_legacy_tokenizer_puts_its_blank_after_special_tokens_too(keep, llama, llama_folder):
    configure(llama_folder, legacy=True)
    for name in {"tokenizer.json", "tokenizer.model"} - {keep}:
        (llama_folder / name).unlink()
    legacy = load_tokenizer(llama_folder)
    # The slow class tokenizes the texts between special tokens one by one, each like a text of its own.
    first, second = (llama(text, add_special_tokens=False).input_ids for text in ("It ends.", "USER: next"))
    assert legacy("It ends.</s>USER: next").input_ids == [1, *first, 2, *second]
    assert llama("It ends.</s>USER: next").input_ids != [1, *first, 2, *second]


def test_without_the_key_legacy_the_slow_class_is_legacy(llama_folder):
    configure(llama_folder, legacy=True)
    (llama_folder / "tokenizer.json").unlink()
    expected = load_tokenizer(llama_folder)("It ends.</s>USER: next").input_ids
    configure(llama_folder, legacy=None)
    assert load_tokenizer(llama_folder)("It ends.</s>USER: next").input_ids == expected


def test_the_old_conversion_with_a_normalizer_is_recognised(llama, llama_folder):
    """Folders converted by older transformers put the blank with a normalizer and have no pre-tokenizer."""
    backend = json.loads((llama_folder / "tokenizer.json").read_text(encoding="utf-8"))
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    backend["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, blanks]}
    backend["pre_tokenizer"] = None
    (llama_folder / "tokenizer.json").write_text(json.dumps(backend), encoding="utf-8")
    for case in json.loads((FIXTURES / "tokenization" / "texts_llama.json").read_text(encoding="utf-8")):
        assert load_tokenizer(llama_folder)(case["text"]).input_ids == case["ids"]


@pytest.mark.parametrize("keep", ["tokenizer.json", "tokenizer.model"])
def test_added_tokens_keep_their_ids(keep, llama_folder):
    for name in {"tokenizer.json", "tokenizer.model"} - {keep}:
        (llama_folder / name).unlink()
    (llama_folder / "added_tokens.json").write_text('{"<pad>": 801, "<|im_end|>": 800}', encoding="utf-8")
    configure(llama_folder, pad_token="<pad>")
    tokenizer = load_tokenizer(llama_folder)
    assert tokenizer.pad_token_id == 801
    assert tokenizer("a <|im_end|>").input_ids[-1] == 800


def test_added_tokens_that_take_the_blanks_around_them_still_do(llama_folder):
    (llama_folder / "tokenizer.json").unlink()
    token = {"content": "<sep>", "lstrip": True, "rstrip": True, "normalized": True, "special": False}
    configure(llama_folder, added_tokens_decoder={"800": token})
    tokenizer = load_tokenizer(llama_folder)
    assert tokenizer("ball  <sep>  red").input_ids == tokenizer("ball<sep>red").input_ids


def test_added_tokens_with_a_gap_before_them_are_an_error(llama_folder):
    (llama_folder / "added_tokens.json").write_text('{"<pad>": 900}', encoding="utf-8")
    with pytest.raises(ValueError, match="gives its added token '<pad>' the id 900"):
        load_tokenizer(llama_folder)


def test_a_tokenizer_without_a_blank_of_its_own_gets_none(llama, llama_folder):
    backend = json.loads((llama_folder / "tokenizer.json").read_text(encoding="utf-8"))
    backend["pre_tokenizer"] = None
    (llama_folder / "tokenizer.json").write_text(json.dumps(backend), encoding="utf-8")
    tokenizer = load_tokenizer(llama_folder)
    assert tokenizer(" ball").input_ids == llama("ball").input_ids
    assert tokenizer("ball").input_ids != llama("ball").input_ids


def test_a_tokenizer_that_adds_no_bos_or_also_eos_is_honoured(llama_folder):
    configure(llama_folder, add_bos_token=False)
    assert tokenize(RECORDS[0], V1, load_tokenizer(llama_folder), 1, 1000).input_ids[0] != 1
    configure(llama_folder, add_bos_token=True, add_eos_token=True)
    tokenizer = load_tokenizer(llama_folder)
    assert tokenizer("").input_ids == [1, 2]
    # ... but a template writes its own end marks.
    sample = tokenize(RECORDS[0], V1, tokenizer, 1, 1000)
    assert sample.input_ids[0] == 1 and np.count_nonzero(sample.input_ids == 2) == 1


@pytest.mark.parametrize("name", ["tokenizer_llama", "legacy", "tokenizer_qwen", "qwen_class", "digits"])
def test_the_exported_tokenizer_and_processor_give_the_ids_trained(name, llama_folder, tmp_path):
    """A processor tokenizes the whole text at once, in which each image has been written as N times <image>."""
    if name == "legacy":
        configure(llama_folder, legacy=True)
    folder = llama_folder if name == "legacy" else FIXTURES / name
    if name == "qwen_class":  # which transformers 5 rebuilds from its vocabulary
        folder = tmp_path / "qwen"
        shutil.copytree(FIXTURES / "tokenizer_qwen", folder)
        configure(folder, tokenizer_class="Qwen2Tokenizer")
    if name == "digits":
        folder = splits_digits(tmp_path / "digits")
    tokenizer = load_tokenizer(folder)
    exported = image_token_tokenizer(tokenizer)
    assert len(exported) == len(tokenizer) + 1 and "<image>" not in tokenizer.get_vocab()
    image_id = exported.convert_tokens_to_ids("<image>")

    processor = LlavaProcessor(load_image_processor(FIXTURES / "clip"), exported, patch_size=14)
    assert processor.image_token_id == image_id
    processor.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text('{"model_type": "llava"}', encoding="utf-8")
    readers = [
        exported,
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
        LlavaProcessor.from_pretrained(tmp_path / "saved").tokenizer,
    ]
    three_in_a_row = conversation("<image><image>\n<image> and\n", " yes", image=["a", "b", "c"])
    checked = 0
    for template in TEMPLATES.values():
        for record in [*RECORDS, three_in_a_row]:
            try:
                sample = tokenize(record, template, tokenizer, 3, 100_000)
            except BadRecord:
                continue
            turns = [turn["value"] for turn in record["conversations"]]
            text = rendered_text(turns, record, template).replace("<image>", "<image>" * 3)
            ids = np.where(sample.input_ids == IMAGE_TOKEN_INDEX, image_id, sample.input_ids).tolist()
            for reader in readers:
                assert reader(text).input_ids == ids, (template.name, record.get("id"))
            checked += 1
    assert checked > 400


def rendered_text(turns, record, template):
    """The text of a record that is known to be good, written independently of the module under test."""
    if record["conversations"][0]["from"] == "system":
        own, *turns = turns
        template = replace(template, opening=template.opening.replace(template.system, own))
    elif record["conversations"][0]["from"] == "gpt":
        turns = turns[1:]
    if template.captions_only:
        turns = ["<image>" * turns[0].count("<image>"), turns[1]]
    elif isinstance(record.get("image"), str):
        turns = [
            ("<image>\n" + turn.replace("<image>", "").strip()).strip() if "<image>" in turn else turn for turn in turns
        ]
    questions = [turn.replace("<image>", template.image_mark) for turn in turns[0::2]]
    return "".join(piece for piece, _ in template.render(questions, turns[1::2]))
