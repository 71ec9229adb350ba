"""FastVLM: timm's FastViTHD as the tower, read from three layouts and written as transformers' FastVlm.

timm needs torchvision, and the one on PyPI does not load beside the CPU build of torch: where it does not, these tests
are skipped. They run on any machine whose torchvision fits its torch: `python -m pytest tests/model/test_fastvlm.py`.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Config, Qwen2ForCausalLM

from mini_llava.arguments import ModelArguments
from mini_llava.data.images import normalisation_table, normalise, pixel_values
from mini_llava.formats import write
from mini_llava.formats.read import load_llava, open_source
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.formats.towers import load_vision_config, load_vision_tower, output_size, tower_image_processor
from mini_llava.model.llava import LlavaModel
from mini_llava.model.vision_tower import empty_model, tokens_per_image
from mini_llava.options.fastvlm import apple_name, check_timm
from mini_llava.tools import chat
from mini_llava.watch.flops import FlopCounter
from tests.end_to_end import runs
from tests.model.tiny_towers import FASTVIT_STRIDE, save_fastvit, save_whole
from tests.published_layouts import FIXTURES

try:
    check_timm()
    TIMM = None
except ValueError as error:
    TIMM = str(error)
needs_timm = pytest.mark.skipif(TIMM is not None, reason=TIMM or "")

SIDE, PATCHES, WIDTH = 2 * FASTVIT_STRIDE, 4, 256
PICTURE = Image.open(FIXTURES / "data" / "images" / "wide_rgb.png")
FP32 = dict.fromkeys(("language_model", "vision_tower", "projector"), torch.float32)


def test_without_timm_a_fastvlm_tower_is_refused_with_a_sentence(tmp_path):
    if TIMM is None:
        pytest.skip("timm is there")
    vision_config = {"model_type": "timm_wrapper", "architecture": "fastvit_mci3"}
    for config in (vision_config, {"model_type": "fast_vlm", "text_config": {}, "vision_config": vision_config}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"The vision tower is a model of timm, .*`pip install timm`; it needs a"):
            load_vision_config(str(tmp_path))


def test_names_in_apples_files_are_those_that_its_code_gives_them():
    for timms, apples in (
        ("stem.0.reparam_conv.weight", "patch_embed.0.reparam_conv.weight"),
        ("stages.0.blocks.1.layer_scale.gamma", "network.0.1.layer_scale"),
        ("stages.1.downsample.proj.0.reparam_conv.bias", "network.1.proj.0.lkb_reparam.bias"),
        ("stages.1.downsample.proj.1.reparam_conv.bias", "network.1.proj.1.reparam_conv.bias"),
        ("stages.2.blocks.23.mlp.conv.bn.running_mean", "network.4.23.convffn.conv.bn.running_mean"),
        ("stages.3.pos_emb.reparam_conv.weight", "network.6.reparam_conv.weight"),
        ("stages.4.blocks.1.token_mixer.proj.weight", "network.10.1.token_mixer.proj.weight"),
        ("stages.4.blocks.0.layer_scale_2.gamma", "network.10.0.layer_scale_2"),
        ("final_conv.se.fc1.weight", "conv_exp.se.reduce.weight"),
        ("final_conv.reparam_conv.bias", "conv_exp.reparam_conv.bias"),
    ):
        assert apple_name(f"timm_model.{timms}") == f"model.{apples}"


def test_the_image_processor_is_in_apples_name_and_in_timms_settings(tmp_path):
    settings = {"input_size": [3, 256, 256], "mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text(json.dumps({"architecture": "x", "pretrained_cfg": settings}))
    (tmp_path / "apple").mkdir()
    (tmp_path / "apple" / "config.json").write_text(json.dumps({"mm_vision_tower": "mobileclip_l_512"}))
    for path, size, mean, std in (
        ("mobileclip_l_1024", 1024, 0, 1),
        (tmp_path / "apple", 512, 0, 1),
        (tmp_path / "timm", 256, 0.5, 0.25),
    ):
        processor = tower_image_processor(str(path))
        assert output_size(processor) == size and processor.image_mean == (mean,) * 3
        assert processor.image_std == (std,) * 3 and pixel_values(PICTURE, processor, "pad").shape == (3, size, size)


@pytest.fixture(scope="module")
def tower_folder(tmp_path_factory) -> str:
    return save_fastvit(tmp_path_factory.mktemp("fastvit"))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> str:
    """A tiny Qwen 2 with a tokenizer of its family."""
    folder = tmp_path_factory.mktemp("qwen2")
    tokenizer = load_tokenizer(FIXTURES / "tokenizer_qwen")
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tower_folder, language_model) -> LlavaModel:
    return llava(language_model, tower_folder)


def llava(base: str, tower: str | None = None) -> LlavaModel:
    flags = ModelArguments(model_name_or_path=base, vision_tower=tower, mm_projector_type="mlp2x_gelu")
    flags.mm_vision_select_layer = -2  # the presets'
    torch.manual_seed(0)
    source = open_source(flags)
    assert source.select_layer == -1, "this tower has an output only"
    return load_llava(source, "sdpa", FP32).eval()


def pictures(count: int = 2) -> torch.Tensor:
    return torch.linspace(0, 900, count * 3 * SIDE**2).view(count, 3, SIDE, SIDE).sin().abs()


@needs_timm
def test_the_full_tower_gives_256_tokens_of_width_3072_at_1024_pixels():
    """Read from a copy without memory, under the name that apple's checkpoints have for it."""
    config = load_vision_config("mobileclip_l_1024")
    assert (config.hidden_size, config.patch_size, tokens_per_image(config, "patch", 1024)) == (3072, 64, 256)
    with pytest.raises(ValueError, match="1000 is not a multiple of 64, the stride of fastvit_mci3"):
        tokens_per_image(config, "patch", 1000)
    with pytest.raises(ValueError, match="has no class token"):
        tokens_per_image(config, "cls_patch", 1024)


@needs_timm
def test_features_are_those_of_timm_row_by_row(tower_folder, model):
    import timm

    arguments = load_vision_config(tower_folder).model_args
    reference = timm.create_model("fastvit_mci3", num_classes=0, **arguments).eval()
    weights = load_file(Path(tower_folder) / "model.safetensors")
    reference.load_state_dict({name.removeprefix("timm_model."): tensor for name, tensor in weights.items()})
    with torch.no_grad():
        grid = reference.forward_features(pictures())
    features = model.vision_tower(pictures())
    assert features.shape == (2, PATCHES, WIDTH)
    for place in range(PATCHES):
        assert torch.equal(features[:, place], grid[:, :, place // 2, place % 2])
    with pytest.raises(ValueError, match=r"--mm_vision_select_layer -2: the vision tower .* has no layers"):
        load_vision_tower(tower_folder, -2, "patch", torch.float32, image_size=SIDE)


@needs_timm
@pytest.mark.parametrize("ratio", ["pad", "square"])
def test_transformers_fastvlm_computes_the_same_features_and_logits(
    tower_folder, language_model, model, ratio, tmp_path
):
    line = save_whole(model, tower_folder, tmp_path, language_model, "qwen_2", ratio=ratio)
    assert "FastVlmForConditionalGeneration.from_pretrained" in line
    whole, loading = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert type(whole).__name__ == "FastVlmForConditionalGeneration" and not any(loading.values()), loading
    whole.eval()
    text = "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    inputs = AutoProcessor.from_pretrained(tmp_path, use_fast=False)(text=text, images=PICTURE, return_tensors="pt")
    ids, image_token = inputs["input_ids"], whole.config.image_token_id
    places = (ids[0] == image_token).nonzero().flatten()
    assert len(places) == PATCHES == whole.config.image_seq_length

    processor = tower_image_processor(tower_folder)
    pixels = normalise(pixel_values(PICTURE, processor, ratio)[None], normalisation_table(processor))
    torch.testing.assert_close(inputs["pixel_values"], pixels, rtol=0, atol=1e-6)
    rows = model.language_model.config.vocab_size
    with torch.no_grad():
        features = model.projector(model.vision_tower(pixels))
        theirs = torch.stack(list(whole.model.get_image_features(pixels).pooler_output))
        embeddings = model.embed(ids.where(ids != image_token, 0), pixels, places)
        expected = model.language_model(inputs_embeds=embeddings, use_cache=False).logits
        found = whole(**inputs).logits[..., :rows]
    torch.testing.assert_close(features, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@needs_timm
def test_it_is_read_back_whole_and_as_a_tower(tower_folder, language_model, model, tmp_path):
    save_whole(model, tower_folder, tmp_path, language_model, "qwen_2")
    again = llava(str(tmp_path))
    rows = model.language_model.config.vocab_size
    assert torch.equal(again.vision_tower(pictures()), model.vision_tower(pictures()))
    assert torch.equal(again.projector(torch.ones(1, WIDTH)), model.projector(torch.ones(1, WIDTH)))
    embeddings = again.language_model.get_input_embeddings().weight[:rows]
    assert torch.equal(embeddings, model.language_model.get_input_embeddings().weight)
    (tmp_path / "preprocessor_config.json").unlink()  # transformers 5 writes none, its settings are the processor's
    alone = llava(language_model, str(tmp_path))
    assert torch.equal(alone.vision_tower(pictures()), model.vision_tower(pictures()))

    flags = ModelArguments(model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="--export_format llava: apple's code has FastVLM's tower under its own names"):
        write.check_may_be_written(tmp_path / "out", flags, "llava", open_source(flags).vision_config)


@needs_timm
def test_a_tower_that_is_trained_keeps_its_statistics_and_all_its_parameters_get_gradients(tower_folder):
    tower = load_vision_tower(tower_folder, -1, "patch", torch.float32, image_size=SIDE).train()
    assert tower.unused_parameters() == set()
    norms = [module for module in tower.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    together = tower(pictures(2))
    together.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in tower.parameters())
    assert norms and all(torch.equal(norm.running_mean, old) for norm, old in zip(norms, before, strict=True))
    # One picture alone or beside another: the same features, but for how a convolution splits its sums.
    torch.testing.assert_close(tower(pictures(2)[:1]), together[:1], rtol=0, atol=1e-4)


@needs_timm
def test_the_operations_counted_are_those_that_torch_does(model):
    frozen = model.requires_grad_(False)
    # Torch's counter does not know the CPU's fused attention: 2 products of positions x positions x width a block.
    attention = 4 * ((SIDE // 32) ** 4 * 64 + (SIDE // 64) ** 4 * 128)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        frozen.projector(frozen.vision_tower(pictures(1)))
    assert FlopCounter(frozen).per_image == counted.get_total_flops() + attention


@needs_timm
def test_apples_own_checkpoints_are_read(language_model, tmp_path):
    """The tower at its full size: apple's config.json does not say the shape. The names are those of apple's files."""
    config = load_vision_config("mobileclip_l_1024")
    weights = {}
    for number, (name, tensor) in enumerate(empty_model(config).state_dict().items()):
        dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        weights[f"model.vision_tower.vision_tower.{apple_name(name)}"] = torch.full(tensor.shape, number, dtype=dtype)
    assert len(weights) == 628, "apple's files have 629 tensors of the tower, the head among them"
    weights["model.vision_tower.vision_tower.model.head.proj"] = torch.zeros(3072, 3072, dtype=torch.bfloat16)
    weights |= load_file(Path(language_model) / "model.safetensors")
    for name, shape in (("0.weight", (64, 3072)), ("0.bias", (64,)), ("2.weight", (64, 64)), ("2.bias", (64,))):
        weights[f"model.mm_projector.{name}"] = torch.randn(shape).mul_(0.02)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    load_tokenizer(language_model).save_pretrained(tmp_path)
    written = json.loads((Path(language_model) / "config.json").read_text())
    written |= {"model_type": "llava_qwen2", "architectures": ["LlavaQwen2ForCausalLM"], "image_aspect_ratio": "pad"}
    written |= {"mm_vision_tower": "mobileclip_l_1024", "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 3072}
    written |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "unfreeze_mm_vision_tower": True}
    (tmp_path / "config.json").write_text(json.dumps(written))

    for base, tower in ((str(tmp_path), None), (language_model, str(tmp_path))):
        flags = ModelArguments(model_name_or_path=base, vision_tower=tower, mm_projector_type="mlp2x_gelu")
        source = open_source(flags)
        assert (source.image_size(), source.select_layer) == (1024, -1)
        read = source.load_vision_tower(torch.bfloat16)
        assert read.tokens_per_image == 256
        state = read.model.state_dict()
        for name, tensor in state.items():
            stored = weights[f"model.vision_tower.vision_tower.{apple_name(name)}"]
            assert torch.equal(tensor.flatten()[:1], stored.flatten()[:1])
    assert source.image_processor().image_mean == (0, 0, 0)
    flags.vision_tower = "mobileclip_l_1024"
    with pytest.raises(ValueError, match="mobileclip_l_1024 is only a name: its weights are inside apple's"):
        open_source(flags)


@needs_timm
def test_timms_own_files_are_read(tower_folder, tmp_path):
    """As `timm/fastvit_mci3.apple_mclip2_dfndr2b` is laid out: other names, a head, the settings in config.json."""
    config = load_vision_config(tower_folder)
    settings = {"input_size": [3, SIDE, SIDE], "mean": [0.0] * 3, "std": [1.0] * 3, "num_classes": 7}
    written = {"architecture": config.architecture, "model_args": config.model_args, "num_classes": 7}
    (tmp_path / "config.json").write_text(json.dumps({**written, "pretrained_cfg": settings}))
    weights = load_file(Path(tower_folder) / "model.safetensors")
    weights = {name.removeprefix("timm_model."): tensor for name, tensor in weights.items()}
    save_file({**weights, "head.fc.weight": torch.zeros(7, WIDTH)}, tmp_path / "model.safetensors", {"format": "pt"})
    flags = ModelArguments(model_name_or_path=str(FIXTURES / "llm"), vision_tower=str(tmp_path))
    source = open_source(flags)
    tower = source.load_vision_tower(torch.float32)
    assert tower.tokens_per_image == PATCHES
    named = load_vision_tower(tower_folder, -1, "patch", torch.float32, image_size=SIDE)
    assert torch.equal(tower(pictures()), named(pictures()))
    processor = source.image_processor()
    assert pixel_values(PICTURE, processor, "pad").shape == (3, SIDE, SIDE) and processor.image_std == (1, 1, 1)


@needs_timm
@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_trains_what_it_says_and_writes_fastvlm(tower_folder, language_model, stage, tmp_path):
    values = dict(
        model_name_or_path=language_model,
        vision_tower=tower_folder,
        version="plain" if stage == 1 else "qwen_2",
        max_steps=2,
        global_batch_size=4,
        save_strategy="no",
    )
    if stage == 2:
        values |= {"unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": 1e-3}
    runs.train_here(runs.flags_of(stage, tmp_path / "run", values))
    losses = [entry["loss"] for entry in runs.log(tmp_path / "run") if "loss" in entry]
    assert losses and all(loss > 0 for loss in losses)
    if stage == 1:
        return
    tower, before = llava(str(tmp_path / "run")).vision_tower.model, load_file(Path(tower_folder) / "model.safetensors")
    parameters = dict(tower.named_parameters())
    assert {name for name, parameter in parameters.items() if torch.equal(parameter, before[name])} == set()
    assert all(torch.equal(buffer, before[name]) for name, buffer in tower.named_buffers())
    picture = str(FIXTURES / "data" / "images" / "wide_rgb.png")
    chat.main([str(tmp_path / "run"), "--image", picture, "--prompt", "What is it?", "--max_new_tokens", "4"])
