"""What a person is shown of a sample is the sample."""

import json

import numpy as np
import pytest

from mini_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, tokenize
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.options.chat_template import find_template
from mini_llava.watch.spans import IMAGE, TRAINED, spans
from tests.end_to_end.runs import FIXTURES

RECORDS = json.loads((FIXTURES / "data" / "records.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["tokenizer_llama", "tokenizer_qwen"])
def tokenizer(request):
    return load_tokenizer(str(FIXTURES / request.param))


def conversation(*turns, **more):
    roles = ("human", "gpt")
    return {"conversations": [{"from": roles[n % 2], "value": text} for n, text in enumerate(turns)]} | more


@pytest.mark.parametrize("version", ["v1", "plain", "chatml_direct"])
def test_spans_are_the_whole_sample_in_its_order_and_images_are_folded(tokenizer, version):
    record = conversation("<image>\nWhat is it?", "A blue bird, “naïve” 鳥.", image="bird.png")
    sample = tokenize(record, find_template(version, tokenizer), tokenizer, tokens_per_image=16, max_length=500)
    found = spans(sample, tokenizer)
    text = sample.input_ids[sample.input_ids != IMAGE_TOKEN_INDEX]
    assert "".join(span.text for span in found if span.kind != IMAGE) == tokenizer.decode(text)
    assert [span for span in found if span.kind == IMAGE] == [type(found[0])(IMAGE, "<image x16>", 16)]
    assert sum(span.tokens for span in found) == len(sample.input_ids)
    trained = [span for span in found if span.kind == TRAINED]
    assert sum(span.tokens for span in trained) == np.count_nonzero(sample.labels != IGNORE_INDEX)
    assert len(trained) == 1 and "A blue bird, “naïve” 鳥." in trained[0].text


def test_each_answer_is_a_span_of_its_own(tokenizer):
    record = conversation("Is it blue?", "yes", "And green?", "no")
    sample = tokenize(record, find_template("v1", tokenizer), tokenizer, tokens_per_image=16, max_length=500)
    trained = [span.text.strip() for span in spans(sample, tokenizer) if span.kind == TRAINED]
    assert [text.split("<")[0] for text in trained] == ["yes", "no"]
