#!/usr/bin/env bash
# llamafactory 0.9.5: with neat_packing, a LLaVA run ends at the first micro-batch in which no record has a picture.
#
# Records of text alone are in every LLaVA mix, and LLaMA-Factory takes them: so that the tower takes part in every
# micro-batch, the collator adds an empty picture and its <image> tokens to the first row. It lengthens input_ids,
# attention_mask and labels, but not the position_ids that packing has made: the row has more tokens than positions,
# and the rotary embedding cannot be applied. The same records train without packing. Which pack comes without a picture
# depends on cutoff_len, so that a run may go on for hours before.
#
# Seen (a random LLaVA of two layers on a CPU, two records of text, cutoff_len 64):
#   packing false, neat_packing false: trained
#   packing true, neat_packing true:   RuntimeError: The size of tensor a (72) must match the size of tensor b (64) at
#                                      non-singleton dimension 2
#
# This script fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# Alone first: the rest of what it requires serves its web page and other models. torchaudio wants the torch of its number.
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llamafactory==0.9.5
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 torchaudio==2.11.0 transformers==5.5.4 \
    accelerate==1.11.0 peft==0.18.1 trl==0.24.0 datasets==4.0.0 fire==0.7.1 omegaconf==2.3.0 torchdata==0.11.0 \
    pillow==13.0.0 requests httpx
cat >"$folder/train.py" <<'PYTHON'
import json
import sys
from pathlib import Path

from llamafactory.train.tuner import run_exp
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

folder, packed = Path(sys.argv[1]), sys.argv[2] == "packed"
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
config = LlavaConfig(
    text_config=LlamaConfig(vocab_size=32, **sizes),
    vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **sizes),
    image_token_index=4,
    image_seq_length=4,
)
LlavaForConditionalGeneration(config).save_pretrained(folder / "model")
words = ["<unk>", "<s>", "</s>", "word", "<image>"]
tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = WhitespaceSplit()
special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
LlavaProcessor(
    image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28),
    tokenizer=tokenizer,
    patch_size=14,
    vision_feature_select_strategy="default",
    num_additional_image_tokens=1,
    image_token="<image>",
).save_pretrained(folder / "model")
said = [{"from": "human", "value": "word"}, {"from": "gpt", "value": "word"}]
(folder / "records.json").write_text(json.dumps([{"conversations": said, "images": []}] * 2))
columns = {"messages": "conversations", "images": "images"}
described = {"records": {"file_name": "records.json", "formatting": "sharegpt", "columns": columns}}
(folder / "dataset_info.json").write_text(json.dumps(described))
settings = dict(stage="sft", do_train=True, finetuning_type="full", template="llava", dataset="records", cutoff_len=64)
settings |= dict(packing=packed, neat_packing=packed, flash_attn="sdpa", max_steps=1, per_device_train_batch_size=1)
settings |= dict(save_strategy="no", report_to="none", use_cpu=True, overwrite_cache=True, plot_loss=False)
paths = dict(model_name_or_path=folder / "model", dataset_dir=folder, output_dir=folder / f"output-{sys.argv[2]}")
run_exp(settings | {name: str(path) for name, path in paths.items()})
print("trained")
PYTHON
export HF_HOME="$folder/cache" HF_HUB_OFFLINE=1
for packing in padded packed; do
    "$folder/venv/bin/python" "$folder/train.py" "$folder" $packing >"$folder/$packing.txt" 2>&1 || true
    echo "$packing: $(grep -E '^trained$|^RuntimeError' "$folder/$packing.txt" || tail -n 3 "$folder/$packing.txt")"
done
grep -qx "trained" "$folder/padded.txt" || { echo "records of text alone no longer train without packing"; exit 1; }
grep -q "^RuntimeError: The size of tensor a (72) must match the size of tensor b (64)" "$folder/packed.txt" ||
    { echo "a pack without a picture no longer ends the run in this way"; exit 1; }
