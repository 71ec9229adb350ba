"""One export gives the training's prompt to servers that tokenize with special tokens and to those without.

transformers' processors, lmms-eval and mlx-vlm tokenize what a chat template wrote with `add_special_tokens=True`,
vLLM's chat endpoint and OpenVINO with False.
"""

import json
import shutil

import numpy as np
import pytest
from jinja2.exceptions import TemplateError
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from mini_llava.data.templates import CHAT_TEMPLATE, TEMPLATES, get_template
from mini_llava.data.tokenization import IMAGE_TOKEN_INDEX, tokenize_prompt
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.formats.write import save_transformers
from mini_llava.options.chat_template import chat_template, find_template
from tests.families import FAMILIES, write_tokenizer
from tests.model.test_formats import FIXTURES, PICTURE, build, described
from tests.slow_llama import configure

CHATS = [name for name, template in TEMPLATES.items() if not template.captions_only]
CASES = [(name, CHAT_TEMPLATE) for name, family in FAMILIES.items() if family.chat_template]
CASES += [(name, family.version) for name, family in FAMILIES.items() if family.version]
CASES += [(kind, name) for kind in ("first", "always", "llama_3", "gemma_2", "qwen_2") for name in CHATS]
TURNS = ["<image>\nWhat is it?", "A cat.", "  Sure?"]
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": TURNS[1]}]},
    {"role": "user", "content": TURNS[2]},
]
SAID = [{"from": ("human", "gpt")[number % 2], "value": turn} for number, turn in enumerate(TURNS)]
IMAGE_TOKENS = 16


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tokenizers as one downloads them; `first` and `always` are where a Llama tokenizer writes its blank."""
    folder = tmp_path_factory.mktemp("bases")
    for name, family in FAMILIES.items():
        write_tokenizer(family, folder / name)
    for name, legacy in (("first", False), ("always", True)):
        configure(shutil.copytree(FIXTURES / "tokenizer_llama", folder / name), legacy=legacy)
    return folder


def trained_prompt(template, tokenizer, image_token_id: int) -> list[int]:
    ids = tokenize_prompt({"image": "a.png", "conversations": SAID}, template, tokenizer, IMAGE_TOKENS)
    return np.where(ids == IMAGE_TOKEN_INDEX, image_token_id, ids).tolist()


@pytest.mark.parametrize("base, version", CASES)
def test_the_prompt_has_the_training_s_ids_with_special_tokens_and_without(base, version, bases, tmp_path):
    tokenizer = load_tokenizer(bases / base)
    template = find_template(version, tokenizer)
    save_transformers(tmp_path, build(), described(tokenizer=tokenizer, template=template, version=version))
    processor, read = AutoProcessor.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    expected = trained_prompt(template, tokenizer, processor.image_token_id)
    picture, about = Image.open(PICTURE).convert("RGB"), dict(add_generation_prompt=True, date_string="26 Jul 2024")

    rendered = processor.apply_chat_template(MESSAGES, **about)
    with_picture = [dict(MESSAGES[0], content=[{"type": "image", "image": picture}, MESSAGES[0]["content"][1]])]
    asked = processor.apply_chat_template([*with_picture, *MESSAGES[1:]], tokenize=True, return_dict=True, **about)
    assert asked["input_ids"][0] == expected
    for special in (True, False):
        found = processor(text=rendered, images=picture, add_special_tokens=special)["input_ids"][0]
        assert found == expected, f"processor, add_special_tokens={special}"
        assert read.apply_chat_template(MESSAGES, tokenize=False, **about) == rendered
        text = rendered.replace("<image>", "<image>" * IMAGE_TOKENS)
        assert read(text, add_special_tokens=special).input_ids == expected, f"tokenizer, {special}"

    # The chat, a further run and a further export read it as they read the base.
    again = load_tokenizer(tmp_path)
    assert trained_prompt(find_template(version, again), again, processor.image_token_id) == expected
    other = get_template("v1")  # a further run may take another template
    assert trained_prompt(other, again, 0) == trained_prompt(other, tokenizer, 0)
    save_transformers(tmp_path / "2", build(), described(tokenizer=again, template=find_template(version, again)))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        first, second = (json.loads((folder / file).read_text()) for folder in (tmp_path, tmp_path / "2"))
        # Written once without its class, a pipeline is read as it stands.
        assert first | {"tokenizer_class": None} == second | {"tokenizer_class": None}, file
    assert (tmp_path / "2" / "chat_template.jinja").read_text() == (tmp_path / "chat_template.jinja").read_text()


def test_older_classes_that_add_bos_by_default_are_told_not_to(bases, tmp_path):
    tokenizer = load_tokenizer(bases / "gemma_2")
    template = find_template(CHAT_TEMPLATE, tokenizer)
    save_transformers(tmp_path, build(), described(tokenizer=tokenizer, template=template))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is config["add_eos_token"] is False


@pytest.fixture(scope="module")
def writer(bases):
    """Writes messages with a named template's exported text."""
    tokenizer = load_tokenizer(bases / "always")

    def write(name: str, messages: list[dict]) -> str:
        about = dict(chat_template=chat_template(get_template(name), "<s>"), add_generation_prompt=True, tokenize=False)
        return tokenizer.apply_chat_template(messages, **about)

    return write


@pytest.mark.parametrize("name", CHATS)
def test_a_system_message_takes_the_place_of_the_template_s_system_prompt(name, writer):
    template, prompt = get_template(name), "Answer in <b>French</b>, {{ shortly }}."
    asked = [{"role": "user", "content": "Hi"}]
    plain = "<s>" + "".join(text for text, _ in template.render(["Hi"], [], generation_prompt=True))
    assert writer(name, asked) == plain
    assert writer(name, [{"role": "system", "content": " "}, *asked]) == plain  # without text it is none
    for content in (prompt, [{"type": "text", "text": prompt}]):
        messages = [{"role": "system", "content": content}, *asked]
        if name == "mistral_instruct":
            with pytest.raises(TemplateError, match=r"trained without a system prompt: write it into the"):
                writer(name, messages)
        else:
            assert template.system and writer(name, messages) == plain.replace(template.system, prompt)
            assert writer(name, messages).count(prompt) == 1


def test_a_system_message_behind_the_first_question_is_refused(writer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Be short."}]
    with pytest.raises(TemplateError, match=r"Roles are user and assistant, and system in front, not system"):
        writer("v1", messages)
