"""Products in float8 are as close to exact ones as its formats allow, and nothing is rounded or kept twice."""

import copy
import functools
import math
import subprocess
import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks import float8_layers
from mini_llava.errors import UserError
from mini_llava.options import float8
from mini_llava.options.float8 import (
    check_copies,
    check_float8,
    choose_float8,
    quantise,
    use_float8,
)
from mini_llava.options.kernels import FUSABLE, forget_outputs_of_norms, make_mlps_keep_less
from tests.launching import ROOT

VALUE, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
# Rounding to nearest changes a value by half a step at most: 2^-4 of it in e4m3 (3 bits of mantissa), 2^-3 in e5m2.
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in (VALUE, GRADIENT)}
# Relative errors of the products' sums are those of the factors, which are independent, put together as a root mean
# square; all of it would be reached if every factor had the largest error. Uniform mantissas have 0.4 times as much.
FORWARD = math.hypot(ROUNDING[VALUE], ROUNDING[VALUE])
BACKWARD = math.hypot(ROUNDING[VALUE], ROUNDING[GRADIENT])


def distance(mine: torch.Tensor, exact: torch.Tensor) -> float:
    return ((mine.float() - exact.float()).norm() / exact.float().norm()).item()


def tiny(family: str = "llama", layers: int = 2, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=176, num_attention_heads=4, num_key_value_heads=2)
    config = AutoConfig.for_model(family, **sizes, num_hidden_layers=layers, max_position_embeddings=64)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").train()


def in_float8(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    use_float8(model)
    return model


def gradients(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("rows", [48, 37, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_and_its_gradients_are_off_by_the_rounding_of_the_formats(rows, bias):
    torch.manual_seed(0)
    layer = nn.Linear(256, 128, bias=bias)
    x, gradient = torch.randn(1, rows, 256), torch.randn(1, rows, 128)
    results = []
    for forward in (layer, functools.partial(float8._linear, layer)):
        layer.zero_grad()
        own = x.clone().requires_grad_()
        y = forward(own)
        y.backward(gradient)
        results.append([y.detach(), own.grad, *(parameter.grad for parameter in layer.parameters())])
    (y, dx, dw, *db), (y8, dx8, dw8, *db8) = results
    assert FORWARD / 10 < distance(y8, y) < FORWARD
    assert BACKWARD / 10 < distance(dx8, dx) < BACKWARD
    assert BACKWARD / 10 < distance(dw8, dw) < BACKWARD
    for mine, exact in zip(db8, db, strict=True):  # a sum of unrounded gradients
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("rows", [48, 37])
def test_an_mlp_and_its_gradients_are_off_by_the_rounding_of_the_formats(rows):
    torch.manual_seed(0)
    mlp = LlamaMLP(AutoConfig.for_model("llama", hidden_size=128, intermediate_size=352))
    x, gradient = torch.randn(1, rows, 128), torch.randn(1, rows, 128)
    results = []
    for forward in (mlp, functools.partial(float8._mlp, mlp, mlp.forward)):
        mlp.zero_grad()
        own = x.clone().requires_grad_()
        y = forward(own)
        y.backward(gradient)
        results.append([y.detach(), own.grad, *(parameter.grad for parameter in mlp.parameters())])
    (y, dx, *dws), (y8, dx8, *dws8) = results
    # gate and up each with the error of a product (silu's slope is 1.1 at most), rounded once more, times down
    assert distance(y8, y) < math.hypot(1.1 * FORWARD, FORWARD, FORWARD)
    # down's product backward; gate and up as forward gave them; rounded once more, times gate and up
    backward = math.hypot(BACKWARD, 1.1 * FORWARD, FORWARD, BACKWARD)
    assert distance(dx8, dx) < backward
    for mine, exact in zip(dws8, dws, strict=True):
        assert distance(mine, exact) < backward


def test_copies_by_rows_and_by_columns_are_the_same_values_padded_with_zeros():
    torch.manual_seed(0)
    x = [torch.randn(37, 32), torch.randn(37, 48)]
    rounded = quantise(x, GRADIENT, dim=1, columns=True)
    assert rounded.columns.shape == (80, 48)
    assert torch.equal(rounded.columns[:, :37].float(), rounded.rows.t().float())
    assert not rounded.columns[:, 37:].float().any()
    assert distance(rounded.rows.float() * rounded.scale, torch.cat(x, dim=1)) < ROUNDING[GRADIENT]

    stacked = quantise([torch.randn(32, 16), torch.randn(48, 16)], VALUE, columns=True)
    assert torch.equal(stacked.columns.float(), stacked.rows.t().float())
    assert stacked.rows.float().abs().max() == torch.finfo(VALUE).max == 448


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so():
    zeros = quantise([torch.zeros(3, 32)], VALUE)
    assert not zeros.rows.float().any() and zeros.scale.isfinite()
    layer = nn.Linear(32, 16)
    x = torch.zeros(3, 32, requires_grad=True)
    y = float8._linear(layer, x)
    (y * 0).sum().backward()
    assert torch.equal(y, layer.bias.expand(3, 16))
    assert not x.grad.any() and not layer.weight.grad.any()
    for value in (math.nan, math.inf, -math.inf):
        x = torch.ones(3, 32)
        x[1, 2] = value
        assert float8._linear(layer, x).isnan().all()


@pytest.mark.parametrize("family", FUSABLE)
def test_gradients_of_a_model_are_near_those_in_fp32(family):
    model, ids = tiny(family), torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(1))
    exact, mine = gradients(model, ids), gradients(in_float8(model), ids)
    assert abs(mine[0] - exact[0]) < 0.01 * exact[0]
    whole = [torch.cat([gradient.flatten() for gradient in result[1:]]) for result in (mine, exact)]
    assert distance(*whole) < BACKWARD
    # Two layers deep an error has been put together from some ten products.
    assert all(distance(a, b) < math.sqrt(10) * BACKWARD for a, b in zip(mine[1:], exact[1:], strict=True) if b.any())


def test_the_head_is_left_in_higher_precision():
    model = in_float8(tiny())
    assert not isinstance(model.lm_head.forward, functools.partial)
    layers = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 14 and all(isinstance(layer.forward, functools.partial) for layer in layers)


def test_checkpointing_gives_the_same_bits():
    model, ids = in_float8(tiny()), torch.randint(0, 64, (2, 17))
    kept = gradients(model, ids)
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    assert all(map(torch.equal, gradients(model, ids), kept))


def test_a_second_backward_pass_gives_the_same_gradients():
    model, ids = in_float8(tiny()), torch.randint(0, 64, (1, 9))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    assert all(torch.equal(2 * grad, parameter.grad) for grad, parameter in zip(once, model.parameters(), strict=True))


def test_inputs_are_rounded_once_for_all_layers_that_read_them(monkeypatch):
    model, ids, casts, scales = in_float8(tiny(layers=1)), torch.randint(0, 64, (1, 20)), [], []

    def counted(calls, function, matrices, *rest):
        calls.extend([tuple(matrix.shape) for matrix in ([matrices] if torch.is_tensor(matrices) else matrices)])
        return function(matrices, *rest)

    monkeypatch.setattr(float8, "cast", functools.partial(counted, casts, float8.cast))
    monkeypatch.setattr(float8, "largest_scale", functools.partial(counted, scales, float8.largest_scale))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    # q and k and v, o, gate and up: one each; of the weights k and v are [32, 64]; what SwiGLU gives has 176 columns.
    inputs = [(20, 64)] * 3 + [(20, 176)]
    weights = [(64, 64)] * 2 + [(32, 64)] * 2 + [(176, 64)] * 2 + [(64, 176)]
    assert sorted(casts) == sorted(scales) == sorted(inputs + weights)

    casts.clear()
    scales.clear()
    loss.backward()
    of_outputs = [(20, 64)] * 3 + [(20, 32)] * 2 + [(20, 352)]  # of q, o, down; k, v; gate and up together
    assert sorted(scales) == sorted(of_outputs)  # inputs and weights have theirs from forward
    assert sorted(casts) == sorted(of_outputs + inputs + weights)


def test_a_frozen_layer_gets_no_gradient_and_its_input_is_not_kept():
    torch.manual_seed(0)
    layer, kept = nn.Linear(64, 32, bias=False), []
    results = []
    for trained in (True, False):
        layer.weight.requires_grad_(trained)
        layer.weight.grad, x = None, torch.ones(5, 64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
            y = float8._linear(layer, x * 2)
        y.sum().backward()
        results.append(x.grad)
        assert (layer.weight.grad is not None) == trained
    assert torch.equal(*results)
    assert sum(tensor.shape == (5, 64) for tensor in kept) == 1


def test_frozen_layers_under_adapters_compute_in_float8_and_adapters_do_not():
    model = get_peft_model(tiny(layers=1), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 64, (2, 17))
    exact, mine = gradients(model, ids), gradients(in_float8(model), ids)
    float8_model = in_float8(model)
    changed = {name for name, m in float8_model.named_modules() if "forward" in vars(m) and isinstance(m, nn.Linear)}
    assert len(changed) == 7 and all(name.endswith("base_layer") for name in changed)
    assert all(distance(a, b) < 3 * BACKWARD for a, b in zip(mine[1:], exact[1:], strict=True))


def test_evaluation_computes_with_the_model_that_is_saved():
    model, ids = tiny(dtype=torch.bfloat16), torch.randint(0, 64, (1, 13))
    mine = in_float8(model)
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, model(ids).logits)
    assert not torch.equal(mine(ids).logits, model(ids).logits)


def test_fp32_masters_get_fp32_gradients_under_autocast():
    model, ids = in_float8(tiny(layers=1)), torch.randint(0, 64, (1, 13))
    outputs = []
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: outputs.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert outputs == [torch.bfloat16]
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def kept_bytes(model: PreTrainedModel) -> int:
    """Bytes kept for backward of the layers, weights aside."""
    storages, weights = {}, {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # held, so that none is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = torch.randn(1, 40, 64, dtype=torch.bfloat16, requires_grad=True)
        positions = model.model.rotary_emb(hidden, torch.arange(40)[None])
        model.model.layers[0](hidden, position_embeddings=positions)
    return sum(storage.nbytes() for storage in storages.values())


def test_no_more_is_kept_for_backward_than_in_bf16():
    model = tiny(layers=1, dtype=torch.bfloat16)
    saving = copy.deepcopy(model)
    make_mlps_keep_less(saving, lambda gate, up: nn.functional.silu(gate) * up)
    forget_outputs_of_norms(saving)
    together = in_float8(saving)
    scales = 8 * 4  # of qkv, o, gate and up, down: inputs and weights
    assert kept_bytes(in_float8(model)) == kept_bytes(together) == kept_bytes(saving) + scales
    assert kept_bytes(saving) < kept_bytes(model)

    ids = torch.randint(0, 64, (2, 17))
    assert all(map(torch.equal, gradients(together, ids), gradients(in_float8(model), ids)))


@pytest.mark.slow
def test_a_model_learns_as_it_does_in_bf16():
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(2))
    curves = []
    for change in (copy.deepcopy, in_float8):
        model = change(tiny(dtype=torch.float32))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(40):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    bf16, mine = curves
    print([f"{a:.3f} {b:.3f}" for a, b in zip(bf16, mine, strict=True)][::5])
    assert mine[-1] < 0.5 * mine[0]
    assert all(abs(a - b) < 0.05 * bf16[0] for a, b in zip(bf16, mine, strict=True))


def test_it_is_used_where_it_was_asked_for_and_refused_where_it_cannot_run(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_float8(False, "llama", cpu) is False
    with pytest.raises(UserError, match="--fp8 True: float8 needs a GPU, this process computes on cpu"):
        choose_float8(True, "llama", cpu)
    with pytest.raises(UserError, match=r"--fp8 True: .*'gpt_neox'"):
        choose_float8(True, "gpt_neox", cuda)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.version, "cuda", None)  # as ROCm's torch and the one for CPUs have it
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        choose_float8(True, "llama", cuda)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UserError, match="NVIDIA A100 does not multiply float8"):
        choose_float8(True, "llama", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_float8(True)


def test_copies_that_differ_end_with_a_sentence(monkeypatch):
    cpu = torch.device("cpu")
    check_copies(cpu)
    right = float8.cast

    def wrong(matrix, scale, rows, columns):  # as ptxas 12.9 has it
        right(matrix, scale, rows, columns)
        if columns is not None:
            columns.view(torch.uint8)[::4] = 0

    monkeypatch.setattr(float8, "cast", wrong)
    monkeypatch.setattr(float8, "triton", types.SimpleNamespace(__version__="3.6.0"), raising=False)
    with pytest.raises(UserError, match=r"Triton 3.6.0 compiles options/float8.py wrongly for this GPU"):
        check_copies(cpu)


def test_a_model_without_layers_in_16_bits_is_refused():
    model = tiny(layers=1)
    for layer in model.model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = type("Linear4bit", (nn.Linear,), {})
    with pytest.raises(UserError, match="no linear layers in 16 bits"):
        use_float8(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 37, 1000])
def test_kernels_give_what_plain_torch_gives(rows):
    float8_layers.check_kernels(torch.device("cuda"), rows)


@pytest.mark.slow
def test_the_benchmark_of_a_layer_runs():
    sizes = ["--device", "cpu", "--positions", "20", "--hidden", "64", "--intermediate", "176"]
    command = [sys.executable, str(ROOT / "benchmarks" / "float8_layers.py"), *sizes]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "The kernels give what plain torch gives." in run.stdout and "times as fast" in run.stdout
