"""`export` overwrites nothing unasked, and says of what is not there what train.py says; so do chat and the doctor."""

import pytest

from mini_llava.tools import chat, doctor, export
from tests.end_to_end.runs import FIXTURES, flags_of, train_here
from tests.launching import ROOT


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    train_here(flags_of(2, folder, {"max_steps": 1, "warmup_ratio": 0, "global_batch_size": 2, "save_strategy": "no"}))
    return folder


def fault(program, capsys, *words: object) -> str:
    """What it says on its way out, one line."""
    with pytest.raises(SystemExit) as end:
        code = program.main([str(word) for word in words])
        raise SystemExit(capsys.readouterr().err if code else None)
    name = program.__name__.split(".")[-1]
    [sentence] = str(end.value.code).strip().splitlines()
    assert sentence.startswith(f"{name}: error: ")
    return sentence.removeprefix(f"{name}: error: ")


def test_a_directory_that_holds_something_is_left_as_it_is_unless_overwriting_is_asked_for(model, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    export.main([str(model), str(out)])  # empty is as good as not there
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    sentence = fault(export, capsys, model, out, "--export_format", "llava", "--vision_tower", FIXTURES / "clip")
    assert sentence.startswith(f"{out} is not empty (chat_template.jinja, config.json, generation_config.json, ...): ")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert "is not empty" in fault(export, capsys, model, model)
    (out / "model.safetensors").write_bytes(b"")
    export.main([str(model), str(out), "--overwrite"])
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_where_nothing_can_be_written_is_said_before_the_model_is_opened(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "(OUT) is a file." in fault(export, capsys, "/no/such/model", tmp_path / "file")
    assert "(OUT) cannot be made: " in fault(export, capsys, "/no/such/model", tmp_path / "file" / "out")


@pytest.mark.parametrize("program", [chat, export, doctor], ids=["chat", "export", "doctor"])
def test_a_place_where_no_model_is_has_the_trainers_sentence(program, model, tmp_path, capsys):
    data = ["--data_path", FIXTURES / "data" / "train_stage1.json", "--model_name_or_path"]
    given = {chat: [model], export: [model, tmp_path / "out"], doctor: [*data, FIXTURES / "llm"]}[program]
    for place, found in ((ROOT / "tests", "a directory without config.json"), ("/no/such", "not a directory")):
        words = ["--vision_tower", place]
        sentence = f"--vision_tower {place} is {found}; give a model's directory or its name on the hub."
        assert fault(program, capsys, *given, *words) == sentence
        with pytest.raises(SystemExit):
            train_here(flags_of(2, tmp_path, {"vision_tower": place}))
        assert capsys.readouterr().err == f"train.py: error: {sentence}\n"
    if program is doctor:
        text = fault(doctor, capsys, *data, "/no/such", "--tokens_per_image", 4)
        assert text.startswith("--model_name_or_path /no/such is not a directory; ")
        text = fault(doctor, capsys, "--data_path", "none.json", *data[2:], FIXTURES / "llm", "--tokens_per_image", 4)
        assert text == "The data file none.json (--data_path) does not exist."
    else:
        assert fault(program, capsys, "/no/such", *given[1:]).startswith("/no/such is not a directory; ")
