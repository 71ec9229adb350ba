"""States and results that earlier versions wrote are read: those in tests/earlier are of commit aa201fc, on one CPU.

    python train.py --stage 1 ... --max_steps 4 --save_steps 2 --output_dir outputs/stage1
    python train.py --stage 2 ... --max_steps 2 --save_strategy no --bf16 True --output_dir outputs/stage2
    python train.py --stage 2 ... --max_steps 2 --save_strategy no --lora_enable True --lora_r 2 \
        --output_dir outputs/llava-lora

with FLAGS below, the models and data of tests/parity/fixtures, and in stage 2 the projector of stage 1.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mini_llava.tools.chat import Conversation
from mini_llava.tools.saved_models import open_saved
from tests.end_to_end.runs import train_here

ROOT = Path(__file__).resolve().parents[1]
FIXTURES, EARLIER = "tests/parity/fixtures", Path("tests/earlier")
FLAGS = dict(
    model_name_or_path=f"{FIXTURES}/llm",
    vision_tower=f"{FIXTURES}/clip",
    data_path=f"{FIXTURES}/data/train_stage1.json",
    image_folder=f"{FIXTURES}/data/images",
    bf16=False,
    gradient_checkpointing=False,
    dataloader_num_workers=0,
    report_to="none",
    global_batch_size=4,
    per_device_train_batch_size=2,
    seed=3,
)
ANSWERS = {"stage2": "\ufffd" * 6 + "ion g", "llava-lora": "\ufffd" * 4 + " ibjebjebje"}


def losses(output_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output_dir / "log.jsonl").read_text().splitlines()]


def test_a_run_goes_on_from_an_earlier_state(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "stage1"
    shutil.copytree(EARLIER / "stage1", output)
    given = FLAGS | {"max_steps": 4, "save_steps": 2, "resume_from_checkpoint": "latest", "output_dir": output}
    train_here([word for name, value in ({"stage": 1} | given).items() for word in (f"--{name}", str(value))])
    expected = losses(EARLIER / "stage1")
    # Another CPU adds up in another order.
    assert losses(output) == pytest.approx(expected, rel=1e-5) and len(expected) == 4
    ours, theirs = (torch.load(folder / "mm_projector.bin") for folder in (output, EARLIER / "stage1"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)  # the steps moved it by up to 1e-3


@pytest.mark.parametrize("name", ANSWERS)
def test_an_earlier_result_answers_as_it_did(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    conversation = Conversation(open_saved(str(EARLIER / name)), torch.float32, "cpu", {"max_new_tokens": 8})
    conversation.add_image(f"{FIXTURES}/data/images/square_rgb.png")
    assert conversation.ask("What is in the picture?") == ANSWERS[name]
