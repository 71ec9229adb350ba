"""Templates are data; one function renders all of them."""

import pytest

from mini_llava.data.templates import TEMPLATES, get_template


def text(pieces):
    return "".join(piece for piece, _ in pieces)


def test_an_unknown_template_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'vicuna_v2'.*llava_llama_2.*qwen_2.*vicuna_v1"):
        get_template("vicuna_v2")


def test_vicuna_v1_is_llavas_name_for_v1():
    assert get_template("vicuna_v1") is get_template("v1")


def test_v1_has_no_blank_after_the_end_mark():
    rendered = text(get_template("v1").render(["Hello", "Bye"], ["Hi", "See you"]))
    assert rendered.endswith("user's questions. USER: Hello ASSISTANT: Hi</s>USER: Bye ASSISTANT: See you</s>")


def test_v0_is_rendered_as_it_was_trained():
    rendered = text(get_template("llava_v0").render(["Hello", "Bye"], ["Hi", "See you"]))
    assert rendered.endswith(
        "human's questions.\n\n### Human: Hello\n### Assistant: Hi\n### Human: Bye\n### Assistant: See you\n### "
    )


def test_llama_2_opens_with_the_system_prompt_inside_the_first_instruction():
    rendered = text(get_template("llama_2").render(["Hello", "Bye"], ["Hi", "See you"]))
    assert rendered.startswith("[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant.")
    assert rendered.endswith("\n<</SYS>>\n\nHello [/INST] Hi </s><s>[INST] Bye [/INST] See you </s>")


def test_mistral_has_no_system_prompt_and_one_bos():
    rendered = text(get_template("mistral_instruct").render(["Hello", "Bye"], ["Hi", "See you"]))
    assert rendered == "[INST] Hello [/INST] Hi </s>[INST] Bye [/INST] See you </s>"


def test_mpt_has_no_newline_between_turns_and_qwen_has():
    mpt = text(get_template("mpt").render(["Hello"], ["Hi"]))
    assert mpt.endswith("honest answers.<|im_end|><|im_start|>user\nHello<|im_end|><|im_start|>assistant\nHi<|im_end|>")
    assert text(get_template("qwen_2").render(["Hello"], ["Hi"])) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
    )


def test_llama_3_follows_metas_headers():
    rendered = text(get_template("llama_3").render(["Hello", "Bye"], ["Hi"], generation_prompt=True))
    assert rendered.startswith("<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision")
    assert rendered.endswith(
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_what_is_trained_is_the_answer_and_the_mark_that_ends_generation(name):
    template = get_template(name)
    questions, answers = (["Q1"], ["A1"]) if template.captions_only else (["Q1", "Q2"], ["A1", "A2"])
    trained = [piece for piece, is_trained in template.render(questions, answers) if is_trained]
    assert len(trained) == len(answers)
    for piece, answer in zip(trained, answers, strict=True):
        assert piece.strip().startswith(answer)
        assert piece.endswith(template.stop)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_generation_prompt_is_the_training_text_before_the_answer(name):
    template = get_template(name)
    training = text(template.render(["Q1"], ["A1"]))
    prompt = text(template.render(["Q1"], [], generation_prompt=True))
    assert training.startswith(prompt)
    assert training[len(prompt) :].strip().startswith("A1")
