"""A model that is not on this machine: whether the hub says no, cannot be reached, or must not be asked."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.launching import ROOT

pytestmark = pytest.mark.slow

# What each of these says when it is given a name, on a line of its own.
ASK = """
import contextlib, io, json, sys
from mini_llava.arguments import ModelArguments
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.hub import find_file
from mini_llava.formats.read import open_source
from mini_llava.formats.towers import load_vision_config
from mini_llava.tools import doctor

data, llm, clip, *names = sys.argv[1:]
def source(name):
    open_source(ModelArguments(model_name_or_path=name, vision_tower=clip))
def tower(name):
    open_source(ModelArguments(model_name_or_path=llm, vision_tower=name))
def doctors(name):
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        doctor.main(["--data_path", data, "--model_name_or_path", name, "--tokens_per_image", "4"])
    raise OSError(error.getvalue().removeprefix("doctor: error: ").strip())
for name in names:
    said = {}
    for ask in (source, tower, load_tokenizer, doctors):
        try:
            ask(name)
        except OSError as error:
            said[ask.__name__] = str(error)
    print(json.dumps(said))
"""


class Hub(BaseHTTPRequestHandler):
    """Answers as the real one does for a gated repository, one that is not there, and one without a config.json."""

    def do_HEAD(self):
        code = {"gated": "GatedRepo", "none": "RepoNotFound"}.get(self.path.split("/")[1], "EntryNotFound")
        self.send_response({"GatedRepo": 403, "RepoNotFound": 401}.get(code, 404))
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


def said(names: list[str], tmp_path, **environment: str) -> list[dict[str, str]]:
    data, fixtures = tmp_path / "data.json", ROOT / "tests" / "parity" / "fixtures"
    data.write_text('[{"id": "0"}]')
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_OFFLINE"))}
    kept |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    command = [sys.executable, "-c", ASK, str(data), str(fixtures / "llm"), str(fixtures / "clip"), *names]
    run = subprocess.run(command, cwd=tmp_path, env=kept | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_hub_that_must_not_be_asked_is_no_proof_that_there_is_no_model(tmp_path):
    [answers] = said(["lmsys/vicuna-7b-v1.5"], tmp_path, HF_HUB_OFFLINE="1")
    assert len(answers) == 4
    for sentence in answers.values():
        assert sentence.startswith(
            "lmsys/vicuna-7b-v1.5 is not here, and HF_HUB_OFFLINE keeps the hub from being asked"
        )


def test_what_the_hub_says_of_a_name_is_said(hub, tmp_path):
    gated, none, empty, wrong = said(["gated/model", "none/model", "some/data", "a/b/c"], tmp_path, HF_ENDPOINT=hub)
    for answers, sentence in (
        (gated, f"gated/model is gated on {hub}: accept its conditions"),
        (none, f"none/model is neither a directory here nor a model on {hub}"),
        (wrong, "a/b/c is neither a directory here nor a name on the hub, which is owner/name."),
    ):
        assert len(answers) == 4
        for text in answers.values():
            assert text.startswith(sentence), answers
    assert empty["source"].startswith("some/data has no config.json, so it is not a model.")
    assert empty["tower"].startswith("some/data has no config.json, so it is not a vision tower")
    assert empty["load_tokenizer"] == empty["doctors"]
    assert empty["doctors"].startswith("some/data has no tokenizer: none of tokenizer.json, ")


def test_a_hub_that_cannot_be_reached_is_said_to_be_unreachable(tmp_path):
    name, endpoint = "lmsys/vicuna-7b-v1.5", "http://127.0.0.1:9"
    only_config = ASK.replace("(source, tower, load_tokenizer, doctors)", "(source,)")
    only_config = "import time; time.sleep = lambda _: None" + only_config  # huggingface_hub tries again for 15 seconds
    data = tmp_path / "data.json"
    kept = os.environ | {
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": endpoint,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "0",
    }
    run = subprocess.run(
        [sys.executable, "-c", only_config, str(data), "", "unused", name], env=kept, capture_output=True, text=True
    )
    [line] = run.stdout.splitlines()
    assert json.loads(line)["source"].startswith(f"{name} is not here, and the hub {endpoint} cannot be reached (")
