"""What a person can fix ends the program with a sentence, and a bug with its traceback: they are other classes."""

import ast
import json
import pickle
import re

import pytest

import train
from mini_llava.data.sampler import OrderError
from mini_llava.errors import UserError
from mini_llava.formats.read import read_language_config
from mini_llava.guards.user_errors import USER_ERRORS
from mini_llava.hub import read_json
from tests.end_to_end.runs import flags_of
from tests.forked_runs import ROOT

# Copied without the rest, or answered by their caller: a flag's value that cannot be converted.
OWN_ERRORS = {"data/sampler.py", "training/schedule.py", "command_line.py"}


def test_the_package_raises_no_bare_value_error():
    for file in (ROOT / "mini_llava").rglob("*.py"):
        raised = {
            node.exc.func.id
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
        }
        if file.relative_to(ROOT / "mini_llava").as_posix() not in OWN_ERRORS:
            assert not raised & {"ValueError", "ImportError", "Exception"}, file


@pytest.mark.parametrize("kind", [UserError, OrderError, FileNotFoundError])
def test_what_a_person_can_fix_is_a_sentence(kind, tmp_path, monkeypatch):
    assert issubclass(kind, USER_ERRORS)
    error = pickle.loads(pickle.dumps(kind("Take another file.")))  # it may come from a worker process
    assert end_of(error, tmp_path, monkeypatch) == "train.py: error: Take another file."


@pytest.mark.parametrize("kind", [ValueError, ImportError, KeyError, RuntimeError])
def test_a_bug_keeps_its_traceback(kind, tmp_path, monkeypatch):
    with pytest.raises(kind, match="list index"):
        end_of(kind("list index"), tmp_path, monkeypatch)


def end_of(error: Exception, output_dir, monkeypatch) -> str:
    """What the program ends with if the training raises this."""

    def raises(*_):
        raise error

    monkeypatch.setattr(train, "train", raises)
    monkeypatch.setattr("sys.argv", ["train.py", *flags_of(2, output_dir, {})])
    with pytest.raises(SystemExit) as end:
        train.main()
    return end.value.code


def test_a_damaged_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match=r"config\.json is not valid JSON \(.*\)\. Fetch or write it again\."):
        read_json(tmp_path, "config.json")


@pytest.mark.parametrize("model_type", ["llama", "llava_llama"])
def test_a_configuration_that_contradicts_itself_is_a_sentence(model_type, tmp_path):
    config = {"model_type": model_type, "hidden_size": 64, "num_attention_heads": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cannot be read by transformers .*64. is not a multiple of") as error:
        read_language_config(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", ["llama", "llava_llama", "llava"])
def test_heads_that_cannot_share_keys_evenly_are_a_sentence(model_type, tmp_path):
    heads = {"hidden_size": 64, "num_attention_heads": 32, "num_key_value_heads": 5}
    inner = {"text_config": heads, "vision_config": {}} if model_type == "llava" else heads
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **inner}))
    sentence = "its config.json has num_attention_heads 32, which is not a multiple of num_key_value_heads 5."
    with pytest.raises(UserError, match=f"^{re.escape(f'{tmp_path}: {sentence}')}$"):
        read_language_config(tmp_path)


def test_a_model_that_transformers_does_not_know_is_a_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "of_tomorrow", "architectures": ["OfTomorrowForCausalLM"]}')
    with pytest.raises(UserError, match=r"cannot be read by transformers [\d.]+: .*model type `of_tomorrow`") as error:
        read_language_config(tmp_path)
    assert "\n" not in str(error.value)
