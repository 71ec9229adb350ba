"""Code that comes with a model, as Python files or in pickles, is refused before it runs, by every way to load one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

import train
from mini_llava import arguments as flags
from mini_llava.formats.read import load_llava, open_source
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.formats.towers import load_image_processor, load_vision_config
from mini_llava.tools import doctor
from tests.end_to_end.runs import FIXTURES, flags_of
from tests.launching import ROOT

# A language model and its configuration, both harmless: all that matters is that the file is run.
OWN_CODE = """
from pathlib import Path
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlamaTokenizer

Path({mark!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(LlamaTokenizer):
    pass
"""
SENTENCE = r"contains its own Python code, which was not run\. .*--trust_remote_code"


def change_json(file: Path, **values) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | values))


@pytest.fixture
def brought(tmp_path):
    """A model directory with code of its own, and the file that is there once the code has run."""
    folder, mark = tmp_path / "brought", tmp_path / "it-ran"
    shutil.copytree(FIXTURES / "llm", folder)
    (folder / "own.py").write_text(OWN_CODE.format(mark=str(mark)))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change_json(folder / "config.json", model_type="own_llama", architectures=["OwnModel"], auto_map=auto_map)
    return folder, mark


def load_model(folder: Path, tower: Path = FIXTURES / "clip"):
    dtypes = dict.fromkeys(("language_model", "vision_tower", "projector"), torch.float32)
    source = open_source(flags.ModelArguments(model_name_or_path=str(folder), vision_tower=str(tower)))
    return load_llava(source, "sdpa", dtypes)


def test_no_loading_function_runs_the_code(brought):
    folder, mark = brought
    with pytest.raises(ValueError, match=SENTENCE):
        load_model(folder)
    with pytest.raises(ValueError, match=SENTENCE):
        load_vision_config(str(folder))
    load_tokenizer(folder)  # needs none
    change_json(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]},
    )
    with pytest.raises(ValueError, match=SENTENCE):
        load_tokenizer(folder)
    shutil.copy(FIXTURES / "clip" / "preprocessor_config.json", folder)
    change_json(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "own.OwnProcessor"})
    load_image_processor(folder)
    assert not mark.exists()


def test_trainer_and_doctor_refuse_it_at_once(brought, tmp_path, capsys):
    folder, mark = brought
    values = {"model_name_or_path": folder, "max_steps": 1, "warmup_ratio": 0}
    with pytest.raises(ValueError, match=SENTENCE):
        train.train(flags.parse_arguments(flags_of(1, tmp_path / "run", values)))
    assert not (tmp_path / "run").exists()
    data = ["--data_path", str(FIXTURES / "data" / "records.json"), "--model_name_or_path", str(FIXTURES / "llm")]
    assert doctor.main([*data, "--vision_tower", str(folder), "--output", str(tmp_path / "bad.jsonl")]) == 2
    assert "--trust_remote_code" in capsys.readouterr().err
    assert not mark.exists()


@pytest.mark.slow
def test_with_the_flag_it_runs_and_trains(brought, tmp_path):
    """In a process of its own, because the code stays in the one that ran it."""
    folder, mark = brought
    values = {
        "model_name_or_path": folder,
        "max_steps": 1,
        "warmup_ratio": 0,
        "trust_remote_code": True,
        "packing": False,
    }
    program = "import train; train.main()"
    command = [sys.executable, "-c", program, *flags_of(2, tmp_path / "run", values)]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr
    assert mark.exists(), "the code of this test is never run, so that the tests above show nothing"
    assert (
        "in the layout of LLaVA's own code: transformers' LLaVA would not run the code that came with OwnM"
        in run.stdout
    )


# Its tokenizer.json splits numbers into digits, and this class does not.
OWN_SPLITS = """
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast


class WholeNumbers(PreTrainedTokenizerFast):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
"""


def pieces(tokenizer) -> list[str]:
    """What of a text is split before its bytes are merged."""
    return [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("2026")]


def test_a_tokenizer_whose_own_code_is_trusted_splits_as_its_code_does(tmp_path):
    """Others are loaded as their tokenizer.json has them, where transformers makes another of it."""
    backend = Tokenizer(BPE({letter: number for number, letter in enumerate(ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    change_json(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    assert pieces(load_tokenizer(tmp_path)) == ["2", "0", "2", "6"]

    (tmp_path / "own.py").write_text(OWN_SPLITS)
    own = {"tokenizer_class": "WholeNumbers", "auto_map": {"AutoTokenizer": [None, "own.WholeNumbers"]}}
    change_json(tmp_path / "tokenizer_config.json", **own)
    with pytest.raises(ValueError, match=SENTENCE):
        load_tokenizer(tmp_path)
    # In a process of its own, because the code stays in the one that ran it.
    program = "import sys; from tests.test_foreign_code import load_tokenizer, pieces; "
    program += "print(pieces(load_tokenizer(sys.argv[1], trust_remote_code=True)))"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "['2026']"


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("part", ["llm", "clip"])
def test_a_model_in_a_pickle_that_runs_code_is_refused_before_it_runs(part, tmp_path):
    shutil.copytree(FIXTURES / part, tmp_path / part)
    (tmp_path / part / "model.safetensors").unlink()
    torch.save({"weight": Malicious(tmp_path / "it-ran")}, tmp_path / part / "pytorch_model.bin")
    folders = [tmp_path / name if name == part else FIXTURES / name for name in ("llm", "clip")]
    with pytest.raises(ValueError, match=rf"^The weights in .*{part} are damaged, or a pickle .*safetensors"):
        load_model(*folders)
    assert not (tmp_path / "it-ran").exists()


def test_nothing_in_the_package_reads_a_pickle_or_yaml_that_could_run_code():
    """The ways that Python, torch, numpy and YAML offer, looked for in the source."""
    for file in [ROOT / "train.py", *(ROOT / "mini_llava").rglob("*.py")]:
        source = file.read_text(encoding="utf-8")
        assert not any(
            name in source for name in ("pickle.load", "weights_only=False", "allow_pickle=True", "yaml.load(")
        )
        assert source.count("torch.load(") == source.count("weights_only=True"), file
        assert source.count("np.load(") == source.count("allow_pickle=False"), file
