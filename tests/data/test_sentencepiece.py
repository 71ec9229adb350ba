"""A bare `tokenizer.model` gives the ids that SentencePiece gives with it under LLaVA's rules, or a sentence."""

import io
import json
import random
import sys

import pytest
from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlavaProcessor

from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import IMAGE_TOKEN_INDEX, tokenize_prompt
from mini_llava.formats.tokenizers import image_token_tokenizer, load_tokenizer
from mini_llava.formats.towers import load_image_processor
from tests.slow_llama import BLANK, FIXTURES, Piece, SlowLlama, configure, like_llama_2, read_model

WORDS = ["The", "ball", "is", "red", "return", "x", "café", "猫", "🦙", "12", "▁", "\t", "\n", "\0", "</s>", "<unk>"]
WORDS += ["<0x0A>", "<|x|>"]


def texts_with_runs_of_blanks(number: int, words=WORDS, seed: int = 0) -> list[str]:
    """Words with 0 to 40 blanks between them, in front and behind; lines of code; nothing but blanks."""
    choose = random.Random(seed)
    texts = [" " * length + end for length in range(1, 70) for end in ("", "x", "\n", "\n" + " " * length)]
    texts += ["a  b", "    return w * h\n        if  x :\n\n", "   leading", "trailing   ", "Two.  Blanks."]
    while len(texts) < number:
        blanks = choose.choices([0, 1, 2, 3, 4, 8, 15, 16, 17, 31, 40], [5, 8, 4, 2, 2, 1, 1, 1, 1, 1, 1], k=9)
        texts.append("".join(" " * count + choose.choice(words) for count in blanks) + " " * choose.choice(blanks))
    return texts


@pytest.fixture
def llama_2(tmp_path):
    return like_llama_2(tmp_path / "llama_2")


def test_the_reference_is_the_slow_class():
    """Recorded with transformers 4.37.2."""
    slow = SlowLlama(FIXTURES / "tokenizer_llama")
    for case in json.loads((FIXTURES / "tokenization" / "texts_llama.json").read_text(encoding="utf-8")):
        assert slow(case["text"]) == case["ids"], repr(case["text"])


def test_merges_are_ordered_by_score_not_by_id(llama_2):
    tokenizer = load_tokenizer(llama_2)
    assert tokenizer.tokenize("the  ball") == ["▁the", "▁", "▁ball"]
    assert tokenizer.tokenize(" " * 21) == [BLANK * 16, BLANK * 6]  # with the tokenizer's own
    assert tokenizer.convert_tokens_to_ids(BLANK * 2) == 259 < tokenizer.convert_tokens_to_ids("▁the")


@pytest.mark.parametrize("legacy", [False, True, None])
def test_ids_are_sentencepieces_own_for_texts_with_runs_of_blanks(legacy, llama_2, tmp_path):
    configure(llama_2, legacy=legacy)
    slow, tokenizer = SlowLlama(llama_2), load_tokenizer(llama_2)
    tokenizer.save_pretrained(tmp_path / "saved")
    texts = texts_with_runs_of_blanks(2500)
    expected = [slow(text) for text in texts]
    assert sum(found != ids for found, ids in zip(tokenizer(texts).input_ids, expected, strict=True)) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(texts).input_ids == expected


@pytest.mark.parametrize("legacy", [False, True])
def test_prompts_and_the_exported_processor_give_them_too(legacy, llama_2, tmp_path):
    configure(llama_2, legacy=legacy)
    slow, tokenizer, template = SlowLlama(llama_2), load_tokenizer(llama_2), get_template("mistral_instruct")
    exported = image_token_tokenizer(tokenizer)
    LlavaProcessor(load_image_processor(FIXTURES / "clip"), exported, patch_size=14).save_pretrained(tmp_path / "saved")
    processor = LlavaProcessor.from_pretrained(tmp_path / "saved")
    questions = ["<image>", "<image> ", " <image>", "<image><image>", "<image>  What", "What  <image>", "<image></s> x"]
    questions += texts_with_runs_of_blanks(2000, [*WORDS, "<image>", "<image>", "<image>\n"])
    different = 0
    for question in questions:
        turns = [{"from": "human", "value": question}]
        record = {"conversations": turns, "image": ["a.png"] * question.count("<image>")}
        text = "".join(piece for piece, _ in template.render([question], [], generation_prompt=True))
        expected = slow.prompt(text, IMAGE_TOKEN_INDEX)
        different += tokenize_prompt(record, template, tokenizer).tolist() != expected
        # As a whole text, too, so that images come first and last.
        different += processor.tokenizer(question).input_ids != slow.prompt(question, processor.image_token_id)
    assert different == 0


def test_a_file_without_a_blank_of_its_own_gets_the_slow_class_s_unless_it_is_legacy(llama_2):
    model = read_model(llama_2)
    model.normalizer_spec.add_dummy_prefix = False
    (llama_2 / "tokenizer.model").write_bytes(model.SerializeToString())
    for legacy, first in ((False, "▁ball"), (True, "b"), (None, "b")):
        configure(llama_2, legacy=legacy)
        slow, tokenizer = SlowLlama(llama_2), load_tokenizer(llama_2)
        assert tokenizer.tokenize("ball")[0] == first
        for text in texts_with_runs_of_blanks(600):
            assert tokenizer(text).input_ids == slow(text), (legacy, text)


def test_user_defined_pieces_are_found_before_anything_is_joined(llama_2, tmp_path):
    model = read_model(llama_2)
    marks = ["<|im_start|>", "<|im_end|>", "<|im|>", "ball", "▁is"]
    taken = {piece.piece for piece in model.pieces}
    model.pieces.extend(Piece(piece=mark, type=Piece.USER_DEFINED) for mark in marks if mark not in taken)
    for piece in model.pieces:
        if piece.piece in marks:
            piece.type = Piece.USER_DEFINED
    (llama_2 / "tokenizer.model").write_bytes(model.SerializeToString())
    for legacy in (False, True):
        configure(llama_2, legacy=legacy)
        slow, tokenizer = SlowLlama(llama_2), load_tokenizer(llama_2)
        tokenizer.save_pretrained(tmp_path / "saved")
        saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert slow("<|im_start|>user")[1:3] == tokenizer.convert_tokens_to_ids([BLANK, "<|im_start|>"])
        for text in texts_with_runs_of_blanks(2000, [*WORDS, *marks[:4], "is"]):
            assert tokenizer(text).input_ids == slow(text) == saved(text).input_ids, (legacy, text)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "llava_llama"])
def test_a_folder_without_a_tokenizer_config_is_read_as_its_model_type_says(model_type, llama_2):
    configure(llama_2, legacy=None)
    slow = SlowLlama(llama_2)
    (llama_2 / "tokenizer_config.json").unlink()
    (llama_2 / "special_tokens_map.json").unlink()
    (llama_2 / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    tokenizer = load_tokenizer(llama_2)
    for text in texts_with_runs_of_blanks(400):
        assert tokenizer(text).input_ids == slow(text), text
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id] == [1, 2, 0]


# --- what cannot be rebuilt ------------------------------------------------------------------------------------------


def trained(**settings) -> ModelProto:
    """A small model trained by SentencePiece, with Llama's settings but for those given."""
    content = io.BytesIO()
    llamas = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentences = [f"{a} {b}  {c}" for a in WORDS[:6] for b in WORDS[:9] for c in WORDS[:6]]
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=content,
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **llamas | settings,
    )
    return ModelProto.FromString(content.getvalue())


def test_a_model_with_llamas_settings_can_be(llama_2):
    (llama_2 / "tokenizer.model").write_bytes(trained().SerializeToString())
    slow, tokenizer = SlowLlama(llama_2), load_tokenizer(llama_2)
    for text in texts_with_runs_of_blanks(600):
        assert tokenizer(text).input_ids == slow(text), text


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"model_type": "unigram"}, "holds a model of type UNIGRAM, not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "replaces characters (nmt_nfkc)"),
        ({"remove_extra_whitespaces": True}, "leaves out the second of two blanks"),
        ({"treat_whitespace_as_suffix": True}, "does not put its blanks in front of words"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_kind_of_model_is_refused(settings, reason, llama_2):
    (llama_2 / "tokenizer.model").write_bytes(trained(**settings).SerializeToString())
    with pytest.raises(ValueError) as error:
        load_tokenizer(llama_2)
    assert f"tokenizer.model {reason}, so that ids other than" in str(error.value)
    assert "Put a tokenizer.json" in str(error.value)


@pytest.mark.parametrize(
    "pieces, reason",
    [
        # As vocabularies that were extended by a script have them: SentencePiece takes the pair further left.
        ([("ba", 1.0), ("ab", 1.0)], "gives 2 pieces the score 1, 'ba' and 'ab' among them"),
        ([("BB", 1.0), ("BBG", 1.0)], "gives 2 pieces the score 1, 'BBG' and 'BB' among them"),
        ([("z猫犬", -5000.0)], "has the piece 'z猫犬', but not each of its characters"),
        ([("zq", -5000.0, Piece.UNUSED)], "marks pieces as unused"),
        ([("baqb", 1.0), ("<|im|>", 0.0, Piece.USER_DEFINED)], "the piece 'baqb' that no text becomes"),
    ],
    ids=["tied", "tied chain", "unknown character", "unused", "not reached"],
)
def test_pieces_that_are_treated_otherwise_are_refused(pieces, reason, llama_2):
    model = read_model(llama_2)
    kept = [piece for piece in model.pieces if piece.piece not in {name for name, *_ in pieces}]
    del model.pieces[:]
    model.pieces.extend(kept)
    model.pieces.extend(
        Piece(piece=name, score=score, type=kind[0] if kind else Piece.NORMAL) for name, score, *kind in pieces
    )
    (llama_2 / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError) as error:
        load_tokenizer(llama_2)
    assert reason in str(error.value)


def test_pieces_of_one_score_that_do_not_compete_are_read(llama_2):
    model = read_model(llama_2)
    model.pieces.extend(Piece(piece=name, score=1.0) for name in ("hj", "qw"))
    (llama_2 / "tokenizer.model").write_bytes(model.SerializeToString())
    slow, tokenizer = SlowLlama(llama_2), load_tokenizer(llama_2)
    for text in texts_with_runs_of_blanks(600, [*WORDS, "hj", "qw", "h", "j", "q", "w"]):
        assert tokenizer(text).input_ids == slow(text), text


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:9e55\nsize 499723\n", "half"]
)
def test_a_file_that_is_no_model_is_named(content, llama_2):
    file = llama_2 / "tokenizer.model"
    file.write_bytes(file.read_bytes()[:5000] if content == "half" else content)
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model, or only a part of one"):
        load_tokenizer(llama_2)


def test_without_the_package_it_is_named(llama_2, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(ValueError, match=r"tokenizer\.model needs packages that are missing: pip install"):
        load_tokenizer(llama_2)


@pytest.mark.parametrize("kind", ["unigram", "normalizer"])
def test_a_tokenizer_json_that_is_not_llamas_stays_as_it_is(kind, llama_2):
    """transformers 5 would rebuild it as a BPE without a normalizer, because of its class."""
    if kind == "unigram":
        pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -4.0), ("b", -3.0), ("ba", -2.0), ("▁ba", -3.0)]
        backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    else:
        pieces = ["<unk>", "<s>", "</s>", "▁", "b", "a", "▁b", "ba", "▁ba"]
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        merges = [("▁", "b"), ("▁b", "a"), ("b", "a")]
        backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.save(str(llama_2 / "tokenizer.json"))
    tokenizer = load_tokenizer(llama_2)
    for text in ("ba", "b ba", "BA b", "ba  ba"):
        assert tokenizer(text).input_ids == [1, *backend.encode(text).ids]
