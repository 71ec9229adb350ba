"""Fused kernels compute what the model computes, and are refused in a sentence where they cannot run."""

import copy
import functools
import importlib
import importlib.util

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from mini_llava.model.llava import token_losses
from mini_llava.options.attention import choose_attention
from mini_llava.options.kernels import (
    FUSABLE,
    choose_fused_kernels,
    forget_outputs_of_norms,
    gated_mlp,
    use_fused_kernels,
)

needs_liger = pytest.mark.skipif(
    not (torch.cuda.is_available() and importlib.util.find_spec("liger_kernel")), reason="needs a GPU and liger-kernel"
)
LENGTHS = (700, 37, 300)


@pytest.fixture
def families_as_before():
    """Liger puts its classes and functions into transformers' modules, for all models that the process makes later."""
    modules = [importlib.import_module(f"transformers.models.{family}.modeling_{family}") for family in FUSABLE]
    before = [dict(vars(module)) for module in modules]
    yield
    for module, names in zip(modules, before, strict=True):
        vars(module).update(names)


def loss_and_gradients(model: torch.nn.Module) -> torch.Tensor:
    """The loss of three packed samples and the gradients of all weights behind each other, fp32."""
    model = model.train()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 500, (1, sum(LENGTHS)), generator=generator).cuda()
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].cuda()
    packing = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=max(LENGTHS), max_length_k=max(LENGTHS))
    logits = model(input_ids=ids, position_ids=positions, use_cache=False, **packing).logits
    loss = token_losses(logits[:, :-1], ids[:, 1:]).sum() / ids.numel()
    loss.backward()
    return torch.cat([loss.detach()[None]] + [p.grad.float().flatten() for p in model.parameters()])


def small(family: str, layers: int) -> PreTrainedConfig:
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=172, num_attention_heads=4, num_key_value_heads=2)
    return AutoConfig.for_model(family, **sizes, num_hidden_layers=layers, max_position_embeddings=64)


@pytest.mark.gpu
@needs_liger
@pytest.mark.parametrize("family", FUSABLE)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.usefixtures("families_as_before")
def test_losses_and_gradients_are_as_close_to_fp32_as_those_of_plain_bf16(family, checkpointing):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=512, hidden_size=256, intermediate_size=688, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    exact = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation="sdpa"
    ).cuda()
    varlen = choose_attention("varlen", family, True, torch.device("cuda"), True)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=varlen).cuda()
    plain.load_state_dict(exact.state_dict())
    fused = copy.deepcopy(plain)
    if checkpointing:
        fused.gradient_checkpointing_enable({"use_reentrant": False})
    reference, of_plain = loss_and_gradients(exact), loss_and_gradients(plain)
    use_fused_kernels(fused)  # after the others have run: it changes the family's rotary embedding for all models
    of_fused = loss_and_gradients(fused)

    plain_error = (of_plain - reference).norm() / reference.norm()
    fused_error = (of_fused - reference).norm() / reference.norm()
    print(f"{family}: distance to fp32 {fused_error:.2e} with fused kernels, {plain_error:.2e} without")
    assert fused_error <= 1.2 * plain_error  # the kernels round at other places, not more often
    # One step takes 8 bits, so that equal losses of bf16 models may differ by some 2^-9 of their value.
    assert abs(of_fused[0] - reference[0]) <= 1.5 * abs(of_plain[0] - reference[0]) + 2**-10 * reference[0]


@pytest.mark.parametrize("autocast", [False, True])
def test_the_mlp_that_keeps_less_gives_the_same_result_and_gradients(autocast):
    def multiply(gate, up):
        return torch.nn.functional.silu(gate) * up

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=172)
    mlp = LlamaMLP(config).double()
    dtype, tolerance = (torch.float32, 0) if autocast else (torch.float64, 1e-14)
    mlp.to(dtype)
    results, kept = [], []
    for forward in (mlp, functools.partial(gated_mlp, mlp, multiply)):
        x = torch.randn(2, 9, 64, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()
        mlp.zero_grad()
        saved = {}
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.setdefault(t.data_ptr(), t), lambda t: t
            ),
        ):
            y = forward(x)
        y.float().square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in mlp.parameters())])
        kept.append(sum(tensor.shape[-1] == 172 and tensor.shape[:2] == (2, 9) for tensor in saved.values()))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert kept[1] == 2 < kept[0]  # gate and up; not their product, nor silu(gate)


@pytest.mark.parametrize("family", FUSABLE)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_norms_made_again_in_backward_give_the_same_loss_and_gradients(family, checkpointing):
    torch.manual_seed(0)
    config = small(family, layers=3)
    kept = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager").train()
    forgotten = copy.deepcopy(kept)
    forget_outputs_of_norms(forgotten)
    ids, results = torch.randint(0, 64, (2, 17)), []
    for model in (kept, forgotten):
        if checkpointing:
            for layer in model.model.layers:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        for _ in range(2):  # gradients add up over micro-batches
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)
    readers = 5 * config.num_hidden_layers
    assert sum(isinstance(module.forward, functools.partial) for module in forgotten.modules()) == readers + 6


def test_a_second_backward_pass_through_a_forgotten_norm_gives_the_same_gradients():
    torch.manual_seed(0)
    config = small("llama", layers=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    forget_outputs_of_norms(model)
    ids = torch.randint(0, 64, (1, 9))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    for first, parameter in zip(once, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * first, rtol=1e-12, atol=1e-15)


def test_a_norm_is_kept_where_a_layer_that_reads_it_is_not_trained_or_has_an_adapter():
    config = small("llama", layers=1)
    model = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"]))
    model.requires_grad_(True)
    model.base_model.model.model.layers[0].self_attn.k_proj.requires_grad_(False)
    forget_outputs_of_norms(model)
    assert not any(isinstance(module.forward, functools.partial) for module in model.modules())


def test_they_are_used_where_they_run_and_refused_elsewhere():
    cpu = torch.device("cpu")
    assert choose_fused_kernels(None, "llama", cpu) is False
    assert choose_fused_kernels(False, "llama", torch.device("cuda")) is False
    with pytest.raises(ValueError, match=r"--use_liger_kernel True: .*(install|need a GPU)"):
        choose_fused_kernels(True, "llama", cpu)


@pytest.mark.skipif(not importlib.util.find_spec("liger_kernel"), reason="needs liger-kernel")
def test_unknown_families_are_left_alone_or_refused():
    cuda = torch.device("cuda")
    assert choose_fused_kernels(None, "gpt_neox", cuda) is False
    with pytest.raises(ValueError, match="gpt_neox"):
        choose_fused_kernels(True, "gpt_neox", cuda)
