"""liger's norms, SwiGLU and rotations in a model on the pretended device; definitions of them stand in for its kernels.

The kernels themselves run in Triton's interpreter, where Triton and liger are installed (`interpreted.py`).
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.kernels import liger_layers, triton_logprobs
from rlhf_ppo.kernels.fused_modules import FusedModule
from rlhf_ppo.kernels.liger_layers import use_liger_layers
from rlhf_ppo.kernels.linear_layers import use_plain_layers
from tests.kernels.test_gpu_trial import set_clock
from tests.support.pretend_cuda import pretend_cuda
from tests.support.tiny_models import tiny_gpt2, tiny_llama

IDS = [[5, 6, 7, 8], [9, 10, 11, 12]]


def function_of(definition: Callable[..., Any], *, overwrites: str = "") -> Any:
    """A function as liger writes them: its backward pass may overwrite what it kept, or the gradients that arrive."""

    class Function:
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            ctx.save_for_backward(*(x for x in arguments if isinstance(x, Tensor)))
            ctx.others = [x for x in arguments if not isinstance(x, Tensor)]
            return definition(*arguments)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            kept = ctx.saved_tensors
            inputs = [x.detach().clone().requires_grad_() for x in kept]
            with torch.enable_grad():
                output = definition(*inputs, *ctx.others)
            found = torch.autograd.grad(output, inputs, grads, allow_unused=True)
            for old, new in zip({"kept": kept, "grads": grads}.get(overwrites, ()), found, strict=False):
                old.copy_(new)
            return *found, *[None] * len(ctx.others)

    return Function


def norm(x: Tensor, weight: Tensor, eps: float, offset: float, mode: str, in_place: bool) -> Tensor:
    assert (offset, mode, in_place) == (0.0, "llama", False)
    return weight * (x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    half = q.shape[-1] // 2
    c, s = (part[..., :half][:, None] for part in (cos, sin))  # liger reads the first half of them
    pairs = ((x[..., :half], x[..., half:]) for x in (q, k))
    q, k = (torch.cat([a * c - b * s, b * c + a * s], dim=-1) for a, b in pairs)
    return q, k


STANDINS = {
    "norm": function_of(norm),
    "swiglu": function_of(
        lambda gate, up: (gate.float() * gate.float().sigmoid()).to(gate.dtype) * up, overwrites="kept"
    ),
    "rotary": function_of(rotary, overwrites="grads"),
}


@pytest.fixture
def _standins(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(liger_layers, "liger_function", STANDINS.get)
    monkeypatch.setattr(liger_layers, "TRIAL_TOKENS", 8)
    monkeypatch.setattr(liger_layers, "_TRIALS", {})
    with pretend_cuda():
        set_clock(monkeypatch, plain=2.0, kernel=1.0)
        yield


def exchanged(model: Any) -> dict[str, int]:
    names = [type(module).__name__ for module in model.modules() if isinstance(module, FusedModule)]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def states_and_gradients(model: Any) -> list[Tensor]:
    states = model.model(torch.tensor(IDS, device="cuda"), use_cache=False).last_hidden_state
    gradients = torch.autograd.grad(states.cos().sum(), [p for p in model.model.parameters() if p.requires_grad])
    return [tensor.detach().cpu() for tensor in (states, *gradients)]


QUICK = {
    ("norm", "wrong"),
    ("rotary", "wrong gradient"),
    ("swiglu", "slower"),
}
"""Each fault once, in one kind of layer; the others are slow tests."""


@pytest.mark.usefixtures("_standins")
@pytest.mark.parametrize("way", ["whole", "recomputed", pytest.param("frozen norms", marks=pytest.mark.slow)])
def test_a_model_has_the_same_states_and_gradients_and_can_be_undone(way: str) -> None:
    model: Any = tiny_llama().cuda()
    if way == "recomputed":
        AutoModelForCausalLMWithValueHead.from_pretrained(model).gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    if way == "frozen norms":
        for name, weight in model.named_parameters():
            weight.requires_grad_("norm" not in name)
    before = [type(module) for module in model.modules()]
    expected = states_and_gradients(model)
    use_liger_layers(model, torch.device("cuda:0"), torch.bfloat16)
    assert exchanged(model) == {"FusedLlamaAttention": 2, "FusedLlamaMLP": 2, "FusedLlamaRMSNorm": 5}
    assert_close(states_and_gradients(model), expected, rtol=1e-4, atol=1e-4)
    use_plain_layers(model)
    assert [type(module) for module in model.modules()] == before
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.usefixtures("_standins")
def test_a_word_that_cannot_be_read_is_refused_before_any_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_PPO_GPU_KERNELS", "liger")
    with pytest.raises(ValueError, match="RLHF_PPO_GPU_KERNELS='liger' cannot be read"):
        use_liger_layers(tiny_llama().cuda(), torch.device("cuda:0"), torch.bfloat16)


@pytest.mark.parametrize(("word", "level"), [("triton", "WARNING"), ("", "INFO")])
def test_who_asks_for_kernels_that_are_not_installed_is_warned(
    word: str, level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("RLHF_PPO_GPU_KERNELS", word)
    monkeypatch.setattr(liger_layers, "FUNCTIONS", {"norm": ("no_such_module", "RMSNorm")})
    assert liger_layers.liger_function.__wrapped__("norm") is None
    monkeypatch.setattr(triton_logprobs, "import_module", lambda name: import_module("no_such_module"))
    assert triton_logprobs.kernel.__wrapped__() is None
    assert [record.levelname for record in caplog.records] == [level, level]


@pytest.mark.usefixtures("_standins")
def test_a_second_backward_pass_and_a_second_derivative_are_refused_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger_layers, "_has_rows", lambda x, dim=1: x.shape[dim] > 1)  # the CPU's own autograd
    model: Any = tiny_llama()
    use_liger_layers(model, torch.device("cpu"), torch.bfloat16)
    assert len(exchanged(model)) == 3
    weight = model.model.layers[0].mlp.gate_proj.weight
    loss = model.model(torch.tensor(IDS)).last_hidden_state.cos().sum()
    torch.autograd.grad(loss, weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, weight)
    loss = model.model(torch.tensor(IDS)).last_hidden_state.cos().sum()
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.usefixtures("_standins")
def test_float32_runs_decoding_and_other_architectures_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    device, model, other = torch.device("cuda:0"), tiny_llama().cuda(), tiny_gpt2().cuda()
    use_liger_layers(model, device, torch.float32)
    use_liger_layers(other, device, torch.bfloat16)
    assert exchanged(model) == exchanged(other) == {}
    use_liger_layers(model, device, torch.bfloat16)

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} for one position")

    monkeypatch.setattr(liger_layers, "liger_function", refuse)
    model(torch.tensor([[5], [6]], device="cuda"))  # decoding: launching them takes longer than one position


@pytest.mark.usefixtures("_standins")
@pytest.mark.parametrize(
    ("name", "kind", "fault"),
    [
        pytest.param(name, kind, fault, marks=[] if (name, fault) in QUICK else pytest.mark.slow)
        for name, kind in {"norm": "RMSNorm", "swiglu": "MLP", "rotary": "Attention"}.items()
        for fault in ("wrong", "wrong gradient", "fails", "slower", "not installed")
    ],
)
def test_what_is_wrong_fails_or_is_slower_stays_plain_and_a_line_says_why(
    name: str, kind: str, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    right = STANDINS[name]

    class Faulty(right):  # type: ignore[misc,valid-type]
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            if fault == "fails":
                raise RuntimeError("no kernel image")
            found = right.forward(ctx, *arguments)
            pair = tuple(1.1 * x for x in (found if isinstance(found, tuple) else (found,)))
            return found if fault != "wrong" else pair if isinstance(found, tuple) else pair[0]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            found = right.backward(ctx, *grads)
            return (1.1 * found[0], *found[1:]) if fault == "wrong gradient" else found

    functions = STANDINS | ({name: Faulty} if fault != "slower" else {})
    monkeypatch.setattr(liger_layers, "liger_function", functions.get if fault != "not installed" else lambda _: None)
    if fault == "slower":
        set_clock(monkeypatch, plain=1.0, kernel=1.0)
    model: Any = tiny_llama().cuda()
    use_liger_layers(model, torch.device("cuda:0"), torch.bfloat16)
    assert f"FusedLlama{kind}" not in exchanged(model)
    if fault == "not installed":
        assert caplog.records == []
        return
    said = {"wrong": "differ by", "wrong gradient": "differ by", "fails": "no kernel image", "slower": "1.00 times"}
    (line,) = [record.getMessage() for record in caplog.records]
    assert said[fault] in line.split(f"Llama{kind} by torch (")[1]
    assert len(exchanged(model)) == (0 if fault == "slower" else 2)


@pytest.mark.slow
def test_the_kernels_themselves_are_right_in_tritons_interpreter() -> None:
    for package in ("triton", "liger_kernel"):
        pytest.importorskip(package)
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.interpreted"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
