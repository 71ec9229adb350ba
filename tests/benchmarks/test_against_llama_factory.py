"""The comparison with LLaMA-Factory: our half, and what is written for and counted in the other, not installed here."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from benchmarks import against_llama_factory, flash_attn_by_torch, llama_factory, random_setup
from tests.launching import CONFIGS
from tests.test_benchmarks import printed_by

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def test_the_stand_in_for_flash_attn_is_as_near_to_fp32_as_bf16_can_be():
    assert 0 < flash_attn_by_torch.distance_to_fp32("cpu") < 0.02
    with pytest.raises(NotImplementedError, match="No dropout"):
        flash_attn_by_torch.flash_attn_func(*[torch.zeros(1, 4, 2, 8)] * 3, window_size=(2, 0))


@pytest.mark.parametrize(("shape", "image_tokens"), [("tiny", 16), ("0.5b", 1024)])
def test_the_converted_model_is_the_one_that_random_setup_wrote(shape, image_tokens, tmp_path, monkeypatch):
    sizes = random_setup.QWEN2_HALF_B | SMALL | {"vocab_size": 500}
    monkeypatch.setattr(random_setup, "QWEN2_HALF_B", sizes)
    monkeypatch.setattr(random_setup, "SIGLIP_B_512", random_setup.SIGLIP_B_512 | SMALL)
    random_setup.make_models(tmp_path, shape, layers=2)
    llama_factory.convert_models(tmp_path, tmp_path / "peer")

    source = AutoModelForCausalLM.from_pretrained(tmp_path / "language_model", dtype=torch.float32)
    model, loaded = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "peer", dtype=torch.float32, output_loading_info=True
    )
    assert not any(loaded.values()), loaded  # none is missing, none left over
    ids, rows = torch.arange(3, 40)[None], source.config.vocab_size
    with torch.no_grad():
        assert torch.equal(model(ids).logits[..., :rows], source(ids).logits)
    tower = load_file(tmp_path / "vision_tower" / "model.safetensors")
    copied = {
        name.removeprefix("vision_model."): weights for name, weights in model.model.vision_tower.state_dict().items()
    }
    for name, weights in tower.items():
        assert torch.equal(copied[name.removeprefix("vision_model.")], weights.float()), name
    projector = [parameter.std().item() for parameter in model.model.multi_modal_projector.parameters()]
    assert min(projector) > 0.01

    processor = AutoProcessor.from_pretrained(tmp_path / "peer")
    assert processor.tokenizer("w0 w9 <image>", add_special_tokens=False)["input_ids"] == [3, 12, rows]
    config = json.loads((tmp_path / "peer" / "config.json").read_text())
    assert (config["image_seq_length"], config["text_config"]["vocab_size"]) == (image_tokens, rows + 64)


def test_records_keep_their_turns_and_pictures(tmp_path):
    random_setup.make_records(tmp_path, count=60, pictures=2)
    llama_factory.convert_records(tmp_path, tmp_path / "data")
    ours = json.loads((tmp_path / "stage2.json").read_text())
    theirs = json.loads((tmp_path / "data" / "records.json").read_text())
    assert [record["conversations"] for record in theirs] == [record["conversations"] for record in ours]
    pictures = [[str(tmp_path / "images" / record["image"])] if "image" in record else [] for record in ours]
    assert [record["images"] for record in theirs] == pictures and [] in pictures


def test_the_clock_counts_records_and_real_tokens_of_packs():
    clock = llama_factory.Clock()
    ids = torch.zeros(1, 8, dtype=torch.long)
    packs = torch.tensor([[1, 1, 1, 2, 2, 0, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]])
    square = torch.where((packs == packs.T) & (packs > 0), 0.0, -1e9)[None, None]
    for mask in (packs, square):  # LLaMA-Factory's with eager attention, and its square one with SDPA
        clock.count(None, (), {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    unpadded = {"input_ids": ids[:, :5], "attention_mask": None, "position_ids": positions[:, :5]}  # FlashAttention's
    clock.count(None, (), unpadded)
    assert torch.stack(clock.given).tolist() == [[2, 5, 8], [2, 5, 8], [2, 5, 5]]


@pytest.mark.slow
def test_our_contenders_run_and_the_ratio_is_printed(tmp_path, capsys):
    random_setup.make_models(tmp_path, "tiny", layers=2)
    random_setup.make_records(tmp_path, count=24, pictures=3)
    own = ["--setup", tmp_path, "--config_file", CONFIGS / "cpu.yaml", "--without_theirs", "--warmup_steps", "1"]
    own += ["--segments", "2", "--steps_per_segment", "1", "--table", tmp_path / "table.jsonl"]
    own += ["--ours", "--learning_rate 1e-3"]
    of_train = ["--stage", "2", "--bf16", "False", "--global_batch_size", "4", "--dataloader_num_workers", "0"]
    printed = printed_by("against_llama_factory.py", [*own, *of_train], tmp_path)
    assert "| ours |" in printed and "| ours, --learning_rate 1e-3 |" in printed
    assert len((tmp_path / "table.jsonl").read_text().splitlines()) == 4

    log = against_llama_factory.read_log(tmp_path / "against-0")
    slower = [{**step, "tokens_per_second": step["tokens_per_second"] / 2} for step in log]
    against_llama_factory.report({"ours": [log], against_llama_factory.PEER: [slower]}, 1, tmp_path / "other.jsonl")
    lines = capsys.readouterr().out.splitlines()
    ratios = {line.split(" | ")[0]: float(line.split()[-2]) for line in lines if line.startswith(("| ours", "| LLaMA"))}
    assert ratios == pytest.approx({"| ours": 2, "| LLaMA-Factory": 1}, rel=0.02)  # of tokens in whole numbers
