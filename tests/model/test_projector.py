"""The projector's kinds, its file, and what is refused instead of half-loaded."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mini_llava.guards.projector_file import check_projector_file
from mini_llava.model import projector as projector_module
from mini_llava.model.projector import build_projector, gathered_state_dict, load_projector, save_projector

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("linear", {"weight": [8, 6], "bias": [8]}),
        ("mlp1x_gelu", {"0.weight": [8, 6], "0.bias": [8]}),
        ("mlp2x_gelu", {"0.weight": [8, 6], "0.bias": [8], "2.weight": [8, 8], "2.bias": [8]}),
        (
            "mlp3x_gelu",
            {
                **{"0.weight": [8, 6], "0.bias": [8], "2.weight": [8, 8], "2.bias": [8]},
                **{"4.weight": [8, 8], "4.bias": [8]},
            },
        ),
    ],
)
def test_kinds_have_llavas_names_and_shapes(kind, shapes):
    projector = build_projector(kind, 6, 8)
    assert {name: list(tensor.shape) for name, tensor in projector.state_dict().items()} == shapes
    assert projector(torch.randn(2, 5, 6)).shape == (2, 5, 8)


def test_mlp2x_gelu_computes_what_its_name_says():
    projector = build_projector("mlp2x_gelu", 6, 8)
    features = torch.randn(3, 6)
    expected = projector[2](nn.functional.gelu(projector[0](features)))
    torch.testing.assert_close(projector(features), expected)


def test_identity_passes_features_on_and_needs_equal_widths():
    features = torch.randn(3, 6)
    assert build_projector("identity", 6, 6)(features) is features
    with pytest.raises(ValueError, match=r"identity.*6 features.*takes 8"):
        build_projector("identity", 6, 8)


@pytest.mark.parametrize("kind", ["mlp", "mlp0x_gelu", "mlp2x_gelu ", "mlp2x_relu", "resampler", "Linear"])
def test_an_unknown_kind_is_an_error_that_lists_the_known(kind):
    with pytest.raises(ValueError, match=r"unknown\. Known are linear, identity and mlpNx_gelu"):
        build_projector(kind, 6, 8)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_a_saved_projector_comes_back(tmp_path, kind):
    saved, loaded = build_projector(kind, 6, 8), build_projector(kind, 6, 8)
    save_projector(saved, tmp_path)
    content = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    assert set(content) == {f"model.mm_projector.{name}" for name in saved.state_dict()}
    load_projector(loaded, tmp_path / "mm_projector.bin")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in saved.state_dict().items())
    assert [file.name for file in tmp_path.iterdir()] == ["mm_projector.bin"]


def test_the_file_has_the_asked_dtype_and_loads_into_the_projectors_own(tmp_path):
    saved, loaded = build_projector("linear", 6, 8), build_projector("linear", 6, 8)
    save_projector(saved, tmp_path / "half.bin", dtype=torch.bfloat16)
    assert torch.load(tmp_path / "half.bin", weights_only=True)["model.mm_projector.weight"].dtype == torch.bfloat16
    load_projector(loaded, tmp_path / "half.bin")
    assert loaded.weight.dtype == torch.float32
    assert torch.equal(loaded.weight, saved.weight.bfloat16().float())


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(projector_module, "is_main_process", lambda: False)
    save_projector(build_projector("linear", 6, 8), tmp_path / "out" / "mm_projector.bin")
    assert not (tmp_path / "out").exists()


def test_gathered_tensors_are_copies_and_only_for_the_main_process(monkeypatch):
    projector = build_projector("linear", 6, 8)
    gathered = dict(gathered_state_dict(projector.named_parameters()))
    with torch.no_grad():
        projector.weight.zero_()
    assert gathered["weight"].abs().sum() > 0
    monkeypatch.setattr(projector_module, "is_main_process", lambda: False)
    assert dict(gathered_state_dict(projector.named_parameters())) == {}


def test_published_weights_of_llava_load(tmp_path):
    golden = load_file(FIXTURES / "llava_init" / "model.safetensors")
    published = {name: tensor for name, tensor in golden.items() if "mm_projector" in name}
    torch.save(published, tmp_path / "mm_projector.bin")
    save_file(published, tmp_path / "projector.safetensors")
    for path in (tmp_path, tmp_path / "projector.safetensors"):
        projector = build_projector("mlp2x_gelu", 32, 64)
        load_projector(projector, path)
        assert torch.equal(projector[2].weight, published["model.mm_projector.2.weight"].float())


def test_names_count_from_after_mm_projector(tmp_path):
    saved, loaded = build_projector("linear", 6, 8), build_projector("linear", 6, 8)
    prefix = "base_model.model.model.mm_projector."
    torch.save({prefix + name: tensor for name, tensor in saved.state_dict().items()}, tmp_path / "mm_projector.bin")
    load_projector(loaded, tmp_path)
    assert torch.equal(loaded.weight, saved.weight)


def refused(tmp_path, content, projector) -> str:
    """The message with which a file with this content is refused for `projector`."""
    path = tmp_path / "mm_projector.bin"
    torch.save(content, path)
    with pytest.raises(ValueError) as caught:
        check_projector_file(projector, path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind, vision_width", [("mlp2x_gelu", 10), ("mlp3x_gelu", 6), ("linear", 6)])
def test_another_projector_is_loaded_not_even_in_part(kind, vision_width, tmp_path):
    projector = build_projector("mlp2x_gelu", 6, 8)
    before = {name: tensor.clone() for name, tensor in projector.state_dict().items()}
    save_projector(build_projector(kind, vision_width, 8), tmp_path)
    with pytest.raises(ValueError, match=r"mm_projector\.bin holds .*, but this projector has "):
        load_projector(projector, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in projector.state_dict().items())


def named(projector) -> dict[str, torch.Tensor]:
    return {f"model.mm_projector.{name}": tensor for name, tensor in projector.state_dict().items()}


def test_a_wrong_shape_names_file_both_shapes_and_the_flag(tmp_path):
    message = refused(tmp_path, named(build_projector("mlp2x_gelu", 6, 8)), build_projector("mlp2x_gelu", 10, 8))
    assert "[8, 6]" in message and "[8, 10]" in message and "--vision_tower" in message
    message = refused(tmp_path, named(build_projector("mlp2x_gelu", 6, 8)), build_projector("mlp2x_gelu", 6, 12))
    assert "[8, 6]" in message and "[12, 6]" in message and "--model_name_or_path" in message


def test_a_wrong_type_names_the_type_that_fits(tmp_path):
    two, three, linear = (build_projector(kind, 6, 8) for kind in ("mlp2x_gelu", "mlp3x_gelu", "linear"))
    assert "lacks 4.weight" in (message := refused(tmp_path, named(two), three)) and "type mlp2x_gelu" in message
    assert "holds 4.weight" in (message := refused(tmp_path, named(three), two)) and "type mlp3x_gelu" in message
    assert "type linear: check --mm_projector_type" in refused(tmp_path, named(linear), two)


def test_other_weights_in_the_file_are_named_and_explained(tmp_path):
    projector = build_projector("linear", 6, 8)
    message = refused(tmp_path, named(projector) | {"model.embed_tokens.weight": torch.zeros(4, 8)}, projector)
    assert "model.embed_tokens.weight" in message and "--mm_use_im_start_end" in message
    message = refused(tmp_path, named(projector) | {"model.vision_resampler.query": torch.zeros(4)}, projector)
    assert "model.vision_resampler.query" in message and "resampler" in message
    assert "lm_head.weight" in refused(tmp_path, {"lm_head.weight": torch.zeros(2)}, projector)


def test_a_quantised_or_odd_file_is_refused(tmp_path):
    projector = build_projector("linear", 6, 8)
    packed = {
        "model.mm_projector.weight": torch.zeros(8, 6, dtype=torch.uint8),
        "model.mm_projector.bias": torch.zeros(8),
    }
    assert "uint8" in refused(tmp_path, packed, projector)
    assert "table of tensors" in refused(tmp_path, [torch.zeros(2)], projector)
    assert "table of tensors" in refused(tmp_path, {"model.mm_projector.weight": 3}, projector)
    twice = named(projector) | {"mm_projector.weight": torch.zeros(8, 6)}
    assert "two tensors" in refused(tmp_path, twice, projector)


class Malicious:
    """Unpickling this creates a file: what a downloaded pickle could do to a home directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_that_runs_code_is_refused_before_it_runs(tmp_path):
    projector = build_projector("linear", 6, 8)
    trace = tmp_path / "it-ran"
    message = refused(tmp_path, named(projector) | {"model.mm_projector.extra": Malicious(trace)}, projector)
    assert "was not loaded" in message
    assert not trace.exists()
    torch.load(tmp_path / "mm_projector.bin", weights_only=False)
    assert trace.exists(), "the file of this test is harmless, so that the test shows nothing"


@pytest.mark.parametrize("name", ["mm_projector.bin", "projector.safetensors"])
def test_a_torn_file_is_named(tmp_path, name):
    projector = build_projector("linear", 6, 8)
    path = tmp_path / name
    if name.endswith("bin"):
        torch.save(named(projector), path)
    else:
        save_file(named(projector), path)
    content = path.read_bytes()
    for length in (0, len(content) // 2):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=name):
            load_projector(projector, path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mm_projector\.bin.*--pretrain_mm_mlp_adapter"):
        load_projector(build_projector("linear", 6, 8), tmp_path)


def test_a_partitioned_projector_is_not_loaded_into(tmp_path):
    projector = build_projector("linear", 6, 8)
    save_projector(projector, tmp_path)
    projector.weight.ds_id = 0
    with pytest.raises(RuntimeError, match="before the projector is partitioned"):
        load_projector(projector, tmp_path)
