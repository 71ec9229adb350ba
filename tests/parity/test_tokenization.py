"""Ids and labels against LLaVA c121f04 under transformers 4.37.2 (qwen_2: ml-fastvlm 592b4ad), recorded in fixtures/.

Where the original is at fault the intended labels are asserted, and FAULTS says what the original does instead.
"""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mini_llava.data.templates import BadRecord, get_template
from mini_llava.data.tokenization import IGNORE_INDEX, tokenize, tokenize_prompt
from mini_llava.formats.tokenizers import load_tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
TEMPLATE_NAMES = ["plain", "v1", "llava_v1", "llava_llama_2", "mistral_instruct", "qwen_2"]
MAX_LENGTH = 384

# What the original does with the records that it treats wrongly.
FAULTS = {
    "separator_in_text": "It splits at end marks and roles even inside a turn, loses count and masks everything.",
    "unk_is_pad": "It takes <unk> in the text for padding, loses count and masks everything.",
    "empty_turn_loses_marks": "It renders an empty turn without its end mark, then masks everything or merges rounds.",
    "zeroed_unanswered_question": "It masks all answers of a conversation that ends with a question.",
    "zeroed_no_human_turn": "It masks a conversation without a human turn completely and trains on nothing.",
    "nothing_left_after_truncation": "It keeps a sample whose answers are all cut off and trains on nothing.",
    "marks_collapsed": "It turns several image marks of a turn into one.",
    "marks_not_counted": "It accepts more marks than images; the model later takes the next sample's image or dies.",
    "image_dropped": "It encodes an image that no mark stands for and throws it away.",
    "mark_without_image": "Its `plain` accepts a mark without an image.",
    "image_label_in_answer": "It gives the image inside an answer the label -200.",
    "bare_exception": "It dies with an AssertionError, KeyError or TypeError that does not name the record.",
}
# Either is sound for these; here an empty text is kept with its end mark, and marks without a place are refused.
CHOICES = {
    "empty_answer": "train",
    "empty_answer_middle": "train",
    "empty_question": "train",
    "image_mark_in_answer": "reject",
    "text_mark_without_image": "reject",
}


def load(name):
    return json.loads((FIXTURES / name).read_text(encoding="utf-8"))


RECORDS = {record["id"]: record for record in load("data/records.json")}
CASES = [
    pytest.param(template, case, id=f"{template}-{case['id']}")
    for template in TEMPLATE_NAMES
    for case in load(f"tokenization/{template}.json")["records"]
    if case["id"] != "image_missing_file"  # not a matter of text
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    only_model = tmp_path_factory.mktemp("only_model") / "tokenizer"
    shutil.copytree(FIXTURES / "tokenizer_llama", only_model)
    (only_model / "tokenizer.json").unlink()
    names = ("tokenizer_llama", "tokenizer_llama_exact", "tokenizer_qwen")
    tokenizers = {name: load_tokenizer(FIXTURES / name) for name in names}
    return {**tokenizers, "only_model": load_tokenizer(only_model)}


@pytest.mark.parametrize("template_name, case", CASES)
def test_ids_equal_the_originals_and_labels_are_the_intended_ones(template_name, case, tokenizers, agree):
    assert case["fault"] is None or case["fault"] in FAULTS
    record, intended = RECORDS[case["id"]], case["intended"]
    template = get_template(template_name)
    tokenizer = tokenizers[load(f"tokenization/{template_name}.json")["tokenizer"]]
    # The original cuts samples with an image later, in its collator; the recorded ids are uncut.
    max_length = 10_000 if "image" in record else MAX_LENGTH

    action = intended["action"]
    if action == "choice":
        action = CHOICES[case["id"]] if template_name != "plain" or case["id"] == "empty_answer" else "reject"
    if case["id"] == "unknown_role" and template.system:
        # From `system`: LLaVA dies of it, here it takes the place of the template's prompt (data/test_tokenize.py).
        text = tokenizer.decode(tokenize(record, template, tokenizer, 1, max_length).input_ids)
        assert "Be short." in text and template.system not in text
        return
    if action == "reject":
        with pytest.raises(BadRecord, match=r"^[^A-Z].*\.$"):
            tokenize(record, template, tokenizer, 1, max_length)
        return

    ids = intended.get("input_ids", case["original"].get("input_ids"))
    labels = [IGNORE_INDEX] * len(ids)
    for start, end in intended["trained"]:
        labels[start:end] = ids[start:end]
    sample = tokenize(record, template, tokenizer, 1, max_length)
    reference = "ml-fastvlm 592b4ad" if template_name == "qwen_2" else "LLaVA c121f04"
    agree("ids of all records and templates", reference, int(sample.input_ids.tolist() != ids), 0)
    reference += " as intended" if case["fault"] else ""
    agree("labels of all records and templates", reference, int(sample.labels.tolist() != labels), 0)
    assert sample.images == ([record["image"]] if "image" in record else [])


@pytest.mark.parametrize("template_name", TEMPLATE_NAMES)
def test_the_generation_prompt_is_what_training_has_before_the_last_answer(template_name, tokenizers):
    tokenizer = tokenizers[load(f"tokenization/{template_name}.json")["tokenizer"]]
    template = get_template(template_name)
    checked = 0
    for case in load(f"tokenization/{template_name}.json")["records"]:
        if case["intended"]["action"] != "train" or case["id"].startswith("human_last"):
            continue
        sample = tokenize(RECORDS[case["id"]], template, tokenizer, 3, 10_000)
        prompt = tokenize_prompt(RECORDS[case["id"]], template, tokenizer, 3)
        assert prompt.tolist() == sample.input_ids[: len(prompt)].tolist(), case["id"]
        assert sample.labels[len(prompt)] != IGNORE_INDEX, case["id"]
        assert sample.labels[len(prompt) - 1] == IGNORE_INDEX, case["id"]
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize("name", ["tokenizer_llama", "tokenizer_llama_exact", "only_model"])
def test_a_llama_tokenizer_gives_the_slow_tokenizers_ids(name, tokenizers):
    for case in load("tokenization/texts_llama.json"):
        assert tokenizers[name](case["text"]).input_ids == case["ids"], repr(case["text"])


@pytest.mark.parametrize("name", ["tokenizer_llama", "only_model"])
def test_the_exact_ids_survive_saving_and_auto_tokenizer(name, tokenizers, tmp_path):
    tokenizers[name].save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for case in load("tokenization/texts_llama.json"):
        assert reloaded(case["text"]).input_ids == case["ids"], repr(case["text"])
    assert reloaded.get_vocab() == tokenizers[name].get_vocab()
    for attribute in (
        "bos_token_id",
        "eos_token_id",
        "unk_token_id",
        "pad_token_id",
        "padding_side",
        "model_max_length",
    ):
        assert getattr(reloaded, attribute) == getattr(tokenizers[name], attribute), attribute


def test_auto_tokenizer_alone_gives_other_ids_which_is_why_there_is_a_loader():
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "tokenizer_llama")
    assert tokenizer(" The ball is red.").input_ids == [1, 301, 520, 265, 512, 672]  # the blank is lost
