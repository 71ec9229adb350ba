"""Other seeds, rates, batch shapes, weight decays and schedules: `train.py`'s loop against a plain PyTorch loop.

The reference takes the samples' ids, labels and pixels as the trainer makes them (test_tokenization.py and
test_images.py hold those) and nothing else: its model is transformers' Llama and CLIP with a projector of two
linear layers, and it computes one sample at a time, so that there is no padding, no packing and no dealing in it.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionModel, LlamaForCausalLM, get_scheduler

from mini_llava import arguments as flags
from mini_llava.data.sampler import GlobalBatchSampler
from mini_llava.data.templates import get_template
from mini_llava.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, tokenize
from mini_llava.formats.tokenizers import load_tokenizer
from mini_llava.training.order import choose_batch
from tests.parity.golden import FIXTURES, IMAGE_TOKENS, as_floats, golden_pixels, load_json
from tests.parity.runs import SETTINGS, TWO_PROCESSES, Run, command_line, flags_of, start_tensors

REFERENCE = "plain PyTorch loop, one sample at a time"
# The same shift of all keys changes no attention weight, so the exact gradient of their bias is zero, and what is
# computed is the rounding of a sum whose terms are also summed up in the gradient of the keys' weights: measured were
# 0.1 to 0.4 times fp32's epsilon of that one's norm, with kernels for AVX-512, AVX2 and neither. It may be zero on one
# side and not on the other: compared are not the two changes, but each with what such a gradient can make.
KEY_BIAS, OF_ROUNDING = "k_proj.bias", 10 * torch.finfo(torch.float32).eps


class Reference:
    """Vision tower, projector and language model; their parameters have the names that LLaVA gives them."""

    def __init__(self, projector):
        self.language_model = LlamaForCausalLM.from_pretrained(FIXTURES / "llm", dtype=torch.float32)
        self.tower = CLIPVisionModel.from_pretrained(FIXTURES / "clip", dtype=torch.float32)
        self.projector = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))
        weights = load_file(projector)
        self.projector.load_state_dict({name.removeprefix("model.mm_projector."): w for name, w in weights.items()})

    def named_parameters(self):
        yield from self.language_model.named_parameters()
        for name, parameter in self.projector.named_parameters():
            yield f"model.mm_projector.{name}", parameter
        for name, parameter in self.tower.named_parameters():
            yield f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}", parameter

    def sum_of_losses(self, sample, aspect_ratio):
        """Cross entropy of one sample's trained tokens, summed."""
        ids, labels = torch.from_numpy(sample.input_ids).long(), torch.from_numpy(sample.labels).long()
        embeddings = self.language_model.get_input_embeddings()(ids.clamp(min=0))
        if sample.images:
            pixels = as_floats(torch.stack(golden_pixels(sample.images, aspect_ratio)))
            features = self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
            is_image = (ids == IMAGE_TOKEN_INDEX).unsqueeze(-1)
            embeddings = embeddings.masked_scatter(is_image, self.projector(features))
        logits = self.language_model(inputs_embeds=embeddings[None], use_cache=False).logits[0]
        return F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")


def rate_of(name, training):
    if "mm_projector" in name:
        return training.mm_projector_lr or training.learning_rate
    if "vision_tower" in name:
        return training.mm_vision_tower_lr or training.learning_rate
    return training.learning_rate


def reference_run(arguments, projector) -> tuple[Run, dict[str, float]]:
    """The run, and how far rounding may have moved the weights whose gradient is nothing else, in norm."""
    model_flags, data_flags, training = arguments.model, arguments.data, arguments.training
    model = Reference(projector)
    trained = {}
    for name, parameter in model.named_parameters():
        is_projector, is_tower = "mm_projector" in name, "vision_tower" in name
        # Nothing behind the last but one layer of the tower (of three) has a part in the loss.
        behind = "layers.2." in name or "post_layernorm" in name
        parameter.requires_grad_(
            (is_projector and not model_flags.freeze_mm_mlp_adapter)
            or (is_tower and model_flags.unfreeze_mm_vision_tower and not behind)
            or not (is_projector or is_tower or model_flags.tune_mm_mlp_adapter)
        )
        if parameter.requires_grad:
            trained[name] = parameter
    groups = []
    for name, parameter in trained.items():
        decays = not (name.endswith("bias") or "norm" in name)
        decay = training.weight_decay if decays else 0.0
        groups.append({"params": [parameter], "lr": rate_of(name, training), "weight_decay": decay})
    optimizer = torch.optim.AdamW(
        groups, betas=(training.adam_beta1, training.adam_beta2), eps=training.adam_epsilon, foreach=False
    )

    template, tokenizer = get_template(model_flags.version), load_tokenizer(FIXTURES / "llm")
    samples = [
        tokenize(record, template, tokenizer, IMAGE_TOKENS, data_flags.model_max_length)
        for record in load_json(f"data/train_stage{arguments.stage}.json")
    ]
    size, count, _ = choose_batch(arguments, 1)
    batches = GlobalBatchSampler(
        *([len(sample.input_ids) for sample in samples], [bool(sample.images) for sample in samples], size, count),
        *(training.seed, data_flags.group_by_modality_length),
    )
    steps = training.max_steps
    if steps <= 0:
        steps = math.ceil(training.num_train_epochs * math.ceil(len(samples) / size))
    warmup = math.ceil(training.warmup_ratio * steps)
    schedule = get_scheduler(training.lr_scheduler_type, optimizer, warmup, steps)

    run, floors = Run([], [], [], {}), {name: 0.0 for name in trained if name.endswith(KEY_BIAS)}
    for batch in batches.batches(steps):
        trained_tokens = {index: int((samples[index].labels[1:] != IGNORE_INDEX).sum()) for index in batch}
        per_micro_batch = training.per_device_train_batch_size
        loss = 0.0
        for number, index in enumerate(batch):
            if training.loss_normalization == "micro_batch":
                first = number // per_micro_batch * per_micro_batch
                mates = batch[first : first + per_micro_batch]
                divisor = sum(trained_tokens[mate] for mate in mates) * training.gradient_accumulation_steps
            else:
                divisor = sum(trained_tokens.values())
            part = model.sum_of_losses(samples[index], data_flags.image_aspect_ratio) / divisor
            if part.requires_grad:
                part.backward()
            loss += part.item()
        for parameter in trained.values():  # text only: LLaVA's gradients of the projector are zero and not absent
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), training.max_grad_norm or math.inf)
        for name in floors:
            size = trained[name.replace("bias", "weight")].grad.norm().item()
            floors[name] = max(floors[name], OF_ROUNDING * size)
        run.losses.append(loss)
        run.gradient_norms.append(norm.item())
        run.learning_rates.append(training.learning_rate * schedule.lr_lambdas[0](len(run.losses) - 1))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    run.tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    # AdamW divides a gradient by no less than epsilon, and its mean over steps is no larger than the largest.
    most = {name: steps * rate_of(name, training) / training.adam_epsilon for name in floors}
    return run, {name: most[name] * floor for name, floor in floors.items()}


@pytest.fixture(scope="module")
def reference(golden_projector, tmp_path_factory):
    """`reference(name)`: what `reference_run` gives, computed once."""
    folder, done = tmp_path_factory.mktemp("reference"), {}

    def get(name):
        if name not in done:
            given = flags_of(f"setting/{name}", folder, golden_projector, processes=1)
            done[name] = reference_run(flags.parse_arguments(command_line(given)), golden_projector)
        return done[name]

    return get


def compare_with_reference(ours, reference, route, golden_projector, agree):
    theirs, floors = reference
    assert len(ours.losses) == len(theirs.losses) >= 6
    rates = zip(ours.learning_rates, theirs.learning_rates, strict=True)
    agree(f"learning rates, {route}", REFERENCE, max(abs(a - b) for a, b in rates), 1e-12)
    losses = zip(ours.losses, theirs.losses, strict=True)
    agree(f"loss, {route}", REFERENCE, max(abs(a - b) for a, b in losses), 1e-5)
    norms = zip(ours.gradient_norms, theirs.gradient_norms, strict=True)
    agree(f"gradient norm, relative, {route}", REFERENCE, max(abs(a - b) / b for a, b in norms), 1e-5)
    start = start_tensors(golden_projector)
    for name, tensor in ours.tensors.items():
        if name in floors:
            moved = max(float((run.tensors[name] - start[name]).norm()) for run in (ours, theirs))
            agree(f"change of the keys' biases, of what rounding may make, {route}", REFERENCE, moved / floors[name], 1)
        elif theirs.tensors[name].equal(start[name]):
            assert tensor.equal(start[name]), f"{name} is frozen and has changed"
        else:
            change = (theirs.tensors[name] - start[name]).norm()
            difference = float((tensor - theirs.tensors[name]).norm() / change)
            # Wider than for the recordings: without warmup or clipping a few elements have gradients that are rounding
            # and little else, and AdamW makes full steps of them.
            agree(f"change of each tensor, relative, {route}", REFERENCE, difference, 3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_give_the_plain_loops_curve(name, one_process, reference, golden_projector, agree):
    run = one_process(f"setting/{name}")
    compare_with_reference(run, reference(name), f"{len(SETTINGS)} other settings", golden_projector, agree)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, name",
    [(backend, name) for backend, names in TWO_PROCESSES.items() for name in names if name.startswith("setting/")],
)
def test_other_settings_come_out_on_two_processes(backend, name, two_processes, reference, golden_projector, agree):
    """Each rank draws the order itself: a step in which they disagreed would have another loss."""
    run = two_processes(backend, name)
    expected = reference(name.removeprefix("setting/"))
    compare_with_reference(run, expected, "other settings on two processes", golden_projector, agree)
