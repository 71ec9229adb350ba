"""A tokenizer's own chat template as the training template: its texts, and labels known by construction."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer

from mini_llava.data.templates import CHAT_TEMPLATE, BadRecord, get_template, written_answer
from mini_llava.data.tokenization import IGNORE_INDEX, tokenize, tokenize_prompt
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.options.chat_template import chat_template, find_template
from mini_llava.tools.chat import Printer
from tests.families import FAMILIES, write_tokenizer

WITH_CHAT_TEMPLATE = [name for name, family in FAMILIES.items() if family.chat_template]
TRIMMED = ("llama_2", "llama_3", "llama_3_2", "gemma_2", "gemma_3")
# What the model is to write for an answer, all of it trained, by family or by named template.
WRITTEN = {
    **dict.fromkeys(("llama_2", "llava_llama_2", "mistral_instruct"), " {} </s>"),
    **dict.fromkeys(("mistral", "v1"), " {}</s>"),
    **dict.fromkeys(("qwen_2", "qwen_2_5", "qwen_3", "smollm2"), "{}<|im_end|>"),
    **dict.fromkeys(("llama_3", "llama_3_2"), "{}<|eot_id|>"),
    **dict.fromkeys(("gemma_2", "gemma_3"), "{}<end_of_turn>"),
    "phi_3": "{}<|end|>",
}
CONVERSATIONS = [
    ["What is it?", "A cat."],
    ["What is it? ", "A cat. \n", "\nSure?", "Yes,\n\nof course.", "猫?", "🦙 and 猫"],
    ["Say nothing.", "", "And now?", "yes"],
    ["turn1.", "turn0.", "turn0.", "turn3."],  # names that the search for the answers uses itself
    ["How does it end?", "With </s>, <|im_end|>, <|eot_id|>, <end_of_turn> or <|end|> and then more."],
    ["user", "assistant", "[INST] [/INST]", "<|im_start|>user"],
    ["Once", "answered", "and once", "more", "then not"],
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for name, family in FAMILIES.items():
        write_tokenizer(family, folder / name)
    return {name: load_tokenizer(folder / name) for name in FAMILIES}


def record(turns, **keys):
    return {"conversations": [{"from": ("human", "gpt")[n % 2], "value": turn} for n, turn in enumerate(turns)], **keys}


def trained_texts(sample, tokenizer):
    """What each stretch of neighbouring trained tokens says, a leading blank included."""
    trained = np.flatnonzero(sample.labels != IGNORE_INDEX)
    before = tokenizer("x", add_special_tokens=False).input_ids
    for run in np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1):
        yield tokenizer.decode([*before, *sample.input_ids[run]])[len(tokenizer.decode(before)) :]


def same_words(found, expected, turns) -> bool:
    """Behind a mark inside a turn Llama's legacy tokenizers write a blank of their own, and Phi's marks swallow one."""
    blank = "" if turns == CONVERSATIONS[4] else " "
    return [text.replace(" ", blank) for text in found] == [text.replace(" ", blank) for text in expected]


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("name", WITH_CHAT_TEMPLATE)
def test_the_trained_tokens_are_the_answers_and_their_end_marks(name, turns, tokenizers):
    tokenizer = tokenizers[name]
    sample = tokenize(record(turns), find_template(CHAT_TEMPLATE, tokenizer), tokenizer, 4, 10_000)
    answers = [turn.strip() if name in TRIMMED else turn for turn in turns[1::2]]
    expected = [WRITTEN[name].format(answer) for answer in answers]
    if name == "qwen_3" and len(turns) % 2 == 0:  # it puts an empty thought before the last answer
        expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
    assert same_words(trained_texts(sample, tokenizer), expected, turns)


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.version])
def test_the_same_holds_for_the_named_template_of_each_family(name, turns, tokenizers):
    version = FAMILIES[name].version
    sample = tokenize(record(turns), get_template(version), tokenizers[name], 4, 10_000)
    expected = [WRITTEN[version].format(answer) for answer in turns[1::2]]
    assert same_words(trained_texts(sample, tokenizers[name]), expected, turns)


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
@pytest.mark.parametrize("name", WITH_CHAT_TEMPLATE)
def test_the_ids_are_those_of_transformers_for_the_same_conversation(name, turns, tokenizers):
    tokenizer = tokenizers[name]
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    template, about = find_template(CHAT_TEMPLATE, tokenizer), dict(return_dict=False, date_string="26 Jul 2024")
    whole = tokenize(record(turns), template, tokenizer, 4, 10_000).input_ids
    assert whole.tolist() == tokenizer.apply_chat_template(messages, **about)
    asked = messages[: len(messages) - (len(messages) + 1) % 2]
    prompt = tokenize_prompt(record(turns), template, tokenizer, 4)
    assert prompt.tolist() == tokenizer.apply_chat_template(asked, add_generation_prompt=True, **about)
    if len(turns) % 2 == 0:
        assert prompt.tolist() == whole[: len(prompt)].tolist(), "a model is asked as it was trained"
    if name in ("llama_3", "llama_3_2", "gemma_2", "gemma_3"):  # whose tokenizers add it, and whose templates write it
        assert whole.tolist().count(tokenizer.bos_token_id) == 1 and whole[0] == tokenizer.bos_token_id


PIECES = [
    "<|im_end|>\n",
    "</s>",
    "<s>",
    " [/INST] ",
    "<|eot_id|>",
    "<end_of_turn>\n<start_of_turn>model\n",
    "<|end|>\n",
]
PIECES += [
    "turn1.",
    "turn2.",
    "<think>",
    "</think>\n\n",
    "\n",
    "  ",
    "{{ bos_token }}",
    "{% generation %}",
    "a",
    "猫",
    "\u2003",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=4).map("".join)


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(TEXTS, min_size=2, max_size=7))
@pytest.mark.parametrize("name", WITH_CHAT_TEMPLATE)
def test_whatever_turns_say_the_text_is_the_templates_and_the_answers_are_known(name, turns, tokenizers):
    tokenizer = tokenizers[name]
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    try:
        pieces = find_template(CHAT_TEMPLATE, tokenizer).render(turns[0::2], turns[1::2])
    except BadRecord:
        assert name == "qwen_3" and any("</think>" in turn or turn.startswith("\n") for turn in turns[1::2])
        return
    about = dict(tokenize=False, date_string="26 Jul 2024")
    assert "".join(text for text, _ in pieces) == tokenizer.apply_chat_template(messages, **about)
    if name == "qwen_3" and any("</think>" in turn for turn in turns[1::2]):  # see the tests of thoughts below
        return
    trained = [text.removeprefix("<think>\n\n</think>\n\n") for text, is_trained in pieces if is_trained]
    answers = [turn.strip() if name in TRIMMED else turn for turn in turns[1::2]]
    assert trained == [WRITTEN[name].format(answer) for answer in answers]


def test_a_template_that_asks_for_the_date_is_told_the_same_one_every_day(tokenizers):
    text = find_template(CHAT_TEMPLATE, tokenizers["llama_3_2"]).render(["Hi"], ["Yes"])[0][0]
    assert "Today Date: 26 Jul 2024\n" in text


THOUGHT, EMPTY = "<think>\nLet me see.\n</think>\n\n", "<think>\n\n</think>\n\n"
# Turns, and what is trained of them with Qwen 3's template, which writes thoughts behind the last question alone.
THOUGHTS = {
    "one round": (["Why?", THOUGHT + "So."], [THOUGHT + "So.<|im_end|>"]),
    "in one line": (["Why?", "<think>Let me see.</think>So."], [THOUGHT + "So.<|im_end|>"]),
    "two rounds": (["Why?", THOUGHT + "So.", "Sure?", THOUGHT + "Yes."], [THOUGHT + "Yes.<|im_end|>"]),
    "then none": (["Why?", THOUGHT + "So.", "Sure?", "Yes."], [EMPTY + "Yes.<|im_end|>"]),
    "none before": (["Why?", "So.", "Sure?", THOUGHT + "Yes."], ["So.<|im_end|>", THOUGHT + "Yes.<|im_end|>"]),
    "empty ones": (["Why?", EMPTY + "So.", "Sure?", EMPTY + "Yes."], ["So.<|im_end|>", EMPTY + "Yes.<|im_end|>"]),
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts_are_trained_where_the_template_writes_them_and_no_answer_without_its_own(name, tokenizers):
    turns, expected = THOUGHTS[name]
    tokenizer = tokenizers["qwen_3"]
    template = find_template(CHAT_TEMPLATE, tokenizer)
    sample = tokenize(record(turns), template, tokenizer, 4, 10_000)
    assert list(trained_texts(sample, tokenizer)) == expected
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    assert sample.input_ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    prompt = tokenize_prompt(record(turns), template, tokenizer, 4).tolist()
    assert prompt == sample.input_ids[: len(prompt)].tolist()


@pytest.mark.parametrize("family", [name for name in WITH_CHAT_TEMPLATE if name != "qwen_3" and name not in TRIMMED])
def test_templates_that_know_no_thoughts_train_them_as_they_stand(family, tokenizers):
    turns = THOUGHTS["two rounds"][0]
    sample = tokenize(record(turns), find_template(CHAT_TEMPLATE, tokenizers[family]), tokenizers[family], 4, 10_000)
    assert same_words(
        trained_texts(sample, tokenizers[family]), [WRITTEN[family].format(turn) for turn in turns[1::2]], turns
    )


def test_a_template_that_asks_for_a_thought_takes_conversations_with_one_in_every_answer(tokenizers):
    """As Qwen's models that always think."""
    jinja = tokenizers["qwen_3"].chat_template
    asking = "{{- '<|im_start|>assistant\\n' }}\n    {%- if enable"
    assert asking in jinja
    jinja = jinja.replace(asking, asking.replace("assistant\\n", "assistant\\n<think>\\n"))
    template = find_template(CHAT_TEMPLATE, with_template(tokenizers["qwen_3"], jinja))
    turns, _ = THOUGHTS["two rounds"]
    pieces = template.render(turns[0::2], turns[1::2])
    assert [text for text, trained in pieces if trained] == ["Let me see.\n</think>\n\nYes.<|im_end|>"]
    with pytest.raises(BadRecord, match="a model would not be asked as it was trained"):
        template.render(["Why?", "Sure?"], ["So.", "Yes."])


def test_thoughts_that_a_template_leaves_out_moves_or_takes_apart_are_bad_records(tokenizers):
    template = find_template(CHAT_TEMPLATE, tokenizers["qwen_3"])
    for answers, sentence in (
        ([THOUGHT + "So."], "leaves out the thoughts of all its answers, so there is nothing to train on"),
        (["Well.</think>So.", "Yes."], "changes turn 2, and not only the blanks around it"),
    ):
        with pytest.raises(BadRecord, match=f"{sentence}.* --version qwen_2 is the one with Qwen's marks"):
            template.render(["Why?", "Sure?"], answers)
    behind = "{% set parts = message.content.split('</think>') %}{{ parts[1:] | join ~ parts[0] }}"
    jinja = LOOP.replace("BODY", TURN.replace("{{ message.content }}", behind))
    template = find_template(
        CHAT_TEMPLATE, with_template(tokenizers["qwen_2"], jinja.replace("PROMPT", "<|im_start|>assistant\n"))
    )
    with pytest.raises(BadRecord, match="moves or repeats the thought of turn 2"):
        template.render(["Why?"], [THOUGHT + "So."])


def test_a_tokenizer_without_a_chat_template_is_an_error_that_lists_the_named_ones(tokenizers):
    with pytest.raises(
        ValueError, match=r"--version chat_template: the tokenizer .*vicuna has no chat template\. .* v1,"
    ):
        find_template(CHAT_TEMPLATE, tokenizers["vicuna"])


LOOP = "{% for message in messages %}BODY{% endfor %}{% if add_generation_prompt %}PROMPT{% endif %}"
TURN = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
REFUSED = {
    "it asks otherwise than it trains": (
        LOOP.replace("BODY", TURN).replace("PROMPT", "<|im_start|>assistant\n<think>\n"),
        r"asks for an answer with .*<think>.*, but before the answers .* not be asked as it was trained",
    ),
    "nothing ends an answer": (
        LOOP.replace("BODY", "{{ message.role }}: {{ message.content }}\n").replace("PROMPT", "assistant: "),
        "puts no special token after an answer, so nothing ends it",
    ),
    "it leaves questions out": (
        LOOP.replace("BODY", TURN.replace("message.content", "'' if message.role == 'user' else message.content")),
        "leaves out or repeats some of its 2 turns",
    ),
    "it wants another conversation": (
        "{{ raise_exception('A system message is needed!') }}",
        "the tokenizer's chat template fails on it: A system message is needed!",
    ),
    "it is broken": ("{% for message in messages %}", "the tokenizer's chat template fails on it: Unexpected end"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_whose_answers_cannot_be_found_is_refused_before_training(name, tokenizers):
    jinja, sentence = REFUSED[name]
    tokenizer = with_template(tokenizers["qwen_2"], jinja)
    with pytest.raises(ValueError, match=f"--version chat_template: .* cannot be trained with: .*{sentence}"):
        find_template(CHAT_TEMPLATE, tokenizer)


def test_what_a_template_does_to_longer_conversations_alone_makes_those_bad_records(tokenizers):
    one_round = LOOP.replace("BODY", "{% if loop.index0 < 2 %}" + TURN + "{% endif %}")
    mark = "{{ '<|endoftext|>' if message.role == 'assistant' and not loop.last else '<|im_end|>' }}"
    ends_differ = LOOP.replace("BODY", TURN.replace("<|im_end|>", mark))
    for jinja, sentence in ((one_round, "leaves out or repeats"), (ends_differ, "does not end all answers alike")):
        tokenizer = with_template(tokenizers["qwen_2"], jinja.replace("PROMPT", "<|im_start|>assistant\n"))
        template = find_template(CHAT_TEMPLATE, tokenizer)
        template.render(["Q1"], ["A1"])
        with pytest.raises(BadRecord, match=sentence):
            template.render(["Q1", "Q2"], ["A1", "A2"])


@pytest.mark.parametrize("name", WITH_CHAT_TEMPLATE)
def test_a_records_own_system_prompt_stands_where_the_template_writes_it_or_is_refused(name, tokenizers):
    tokenizer = tokenizers[name]
    template = find_template(CHAT_TEMPLATE, tokenizer).with_system("Be short.")
    turns = ["Q1", "A1", "Q2", "A2"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    messages.insert(0, {"role": "system", "content": "Be short."})
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:  # Gemma 2's
        with pytest.raises(BadRecord, match="chat template fails on it"):
            template.render(turns[0::2], turns[1::2])
        return
    pieces = template.render(turns[0::2], turns[1::2])
    (_, *found), (_, *expected) = ("".join(text for text, _ in pieces).split("Be short."), whole.split("Be short."))
    assert len(expected) == 1 and [text.split() for text in found] == [text.split() for text in expected]
    assert all("Be short." not in text for text, is_trained in pieces if is_trained)


def test_a_template_that_leaves_a_system_prompt_out_is_named(tokenizers):
    turns = LOOP.replace("BODY", "{% if message.role != 'system' %}" + TURN + "{% endif %}")
    tokenizer = with_template(tokenizers["qwen_2"], turns.replace("PROMPT", "<|im_start|>assistant\n"))
    template = find_template(CHAT_TEMPLATE, tokenizer)
    with pytest.raises(BadRecord, match="a system prompt of its own, which the tokenizer's chat template leaves out"):
        template.with_system("Be short.").render(["Q1"], ["A1"])


def test_a_templates_own_marks_say_what_is_trained(tokenizers):
    """As SmolLM3's: the empty thought before an answer is written for the model, and not to be learnt."""
    body = (
        "<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}<think>\n\n</think>\n"
        "{% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ message.content }}<|im_end|>\n{% endif %}"
    )
    jinja = LOOP.replace("BODY", body).replace("PROMPT", "<|im_start|>assistant\n<think>\n\n</think>\n")
    template = find_template(CHAT_TEMPLATE, with_template(tokenizers["qwen_2"], jinja))
    trained = [text for text, is_trained in template.render(["Q1", "Q2"], ["A1", "A2"]) if is_trained]
    assert trained == ["A1<|im_end|>\n", "A2<|im_end|>\n"] and template.stop == ("<|im_end|>",)

    marked = "{% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}"
    unmarked = "{{ message.content + '<|im_end|>\n' }}"
    some = body.replace(marked, "{% if loop.index0 < 2 %}" + marked + "{% else %}" + unmarked + "{% endif %}")
    template = find_template(CHAT_TEMPLATE, with_template(tokenizers["qwen_2"], jinja.replace(body, some)))
    assert [text for text, is_trained in template.render(["Q1"], ["A1"]) if is_trained] == ["A1<|im_end|>\n"]
    with pytest.raises(BadRecord, match=r"marks answers by {% generation %}, but not all of them"):
        template.render(["Q1", "Q2"], ["A1", "A2"])


@pytest.mark.parametrize("name", WITH_CHAT_TEMPLATE)
def test_the_exported_template_writes_the_same_text_also_for_messages_with_pictures(name, tokenizers):
    tokenizer = tokenizers[name]
    template, about = find_template(CHAT_TEMPLATE, tokenizer), dict(tokenize=False, date_string="26 Jul 2024")
    exported = with_template(tokenizer, chat_template(template))
    words = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A cat."}]
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    expected = "".join(text for text, _ in template.render(["<image>\nWhat is it?"], ["A cat."]))
    for messages in (words, parts):
        assert exported.apply_chat_template(messages, **about) == expected
    again = find_template(CHAT_TEMPLATE, exported)
    assert chat_template(again) == exported.chat_template, "it grows once, and not with every export"
    assert "".join(text for text, _ in again.render(["<image>\nWhat is it?"], ["A cat."])) == expected


def test_what_a_model_writes_before_its_answer_is_none_of_it(tokenizers):
    template = find_template(CHAT_TEMPLATE, tokenizers["qwen_3"])
    assert written_answer(template, "<think>\n\n</think>\n\nA cat.<|im_end|>\n<|im_start|>") == "A cat."
    assert written_answer(get_template("v1"), " A cat.</s>USER") == "A cat."


@pytest.mark.parametrize("name, version", [("qwen_3", CHAT_TEMPLATE), ("vicuna", "v1"), ("gemma_2", CHAT_TEMPLATE)])
def test_the_chat_prints_the_answer_alone_while_it_is_written(name, version, tokenizers, capsys):
    tokenizer, answer = tokenizers[name], "A cat, and a dog. \n\nSure."
    template = find_template(version, tokenizer)
    printer = Printer(SimpleNamespace(template=template, tokenizer=tokenizer))
    written = template.answer_lead + answer + template.stop[0]
    printer.put(torch.tensor([[1, 2, 3]]))  # the prompt, which is not shown
    for number in tokenizer(written, add_special_tokens=False).input_ids:
        printer.put(torch.tensor([number]))
    printer.end()
    assert capsys.readouterr().out == answer + "\n"


def with_template(tokenizer, jinja: str):
    changed = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    changed.chat_template = jinja
    return changed
