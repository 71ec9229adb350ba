"""The figures of README and docs/ show what the trainer's own functions do."""

import numpy as np
import pytest
from PIL import Image

from benchmarks import figures


def test_packing_computes_real_tokens_only_and_every_layout_less_than_the_one_before():
    lengths, has_image = figures.conversations(1280)
    assert 0.9 < np.mean(has_image) < 0.97 and max(lengths) <= 2048
    shares = figures.real_shares(lengths, has_image)
    assert shares["in_order"] < shares["padded"] < shares["packed"] == 1


def test_the_record_that_is_drawn_has_an_image_token_for_each_patch_and_trains_its_answer_alone():
    tokens = figures.tokens_of_the_record()
    assert sum(is_image for _, is_image, _ in tokens) == figures.PATCHES**2
    assert [text for text, _, is_trained in tokens if is_trained] == ["▁blue", "</s>"]
    assert (figures.QUESTION, figures.ANSWER) in figures.demo.read_questions("test")[figures.PICTURE]
    drawn = figures.cells_of_the_record()
    assert [text for text, colour in drawn if colour == figures.TRAINED] == ["blue", "</s>"]
    assert [text for text, colour in drawn if colour == figures.IMAGE] == ["1", "2", "3", "…", "64"]


@pytest.mark.slow
def test_each_figure_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(figures.LANGUAGE_MODELS, "7b", figures.LANGUAGE_MODELS["tiny"] | {"num_hidden_layers": 1})
    monkeypatch.setattr(figures, "CLIP_L_336", {**figures.CLIP_L_336, "num_hidden_layers": 2})
    monkeypatch.setattr("sys.argv", ["figures.py", str(tmp_path / "figures")])
    figures.main()
    for name in figures.FIGURES:
        pixels = np.asarray(Image.open(tmp_path / "figures" / name).convert("L"))
        assert pixels.shape[1] == 1100 and 0.01 < (pixels < 200).mean() < 0.9, name
