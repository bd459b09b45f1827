"""The Triton kernels themselves, on a CPU: run as a module with TRITON_INTERPRET=1, which is read before the import.

Triton's interpreter has no libdevice and takes Python floats as they are: liger's norm gets a root and numbers here.
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.testing import assert_close
from triton.runtime import interpreter

from rlhf_ppo.kernels import liger_layers
from rlhf_ppo.kernels.fused_modules import FusedModule
from rlhf_ppo.kernels.linear_layers import use_plain_layers
from rlhf_ppo.kernels.linear_logprobs import FusedLinearLogprobs, LinearLogprobsSettings, LossGradient
from rlhf_ppo.kernels.triton_logprobs import fold_block, kernel
from tests.support.tiny_models import tiny_llama


@triton.jit
def rsqrt(x: Any) -> Any:
    """1 / sqrt(x)."""
    return 1 / tl.sqrt(x)


def convert(argument: Any, plain: Any = interpreter._implicit_cvt) -> Any:
    """A kernel's argument; a float as compiled kernels get it."""
    if not isinstance(argument, float):
        return plain(argument)
    return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)


def head() -> None:
    """TRL's kernel gives the definition's log-probabilities, entropies and gradients, in float64."""
    assert kernel() is not None
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((24, 32), (3000, 32), (3000,)))
    tokens = torch.randint(0, 3000, (24,), generator=generator)
    bias[tokens[0]] = bias[7] = -torch.inf
    slopes = torch.randn(2, 24, generator=generator)
    slopes[:, 0] = 0.0
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    log_p = ((exact[0] @ exact[1].t() + exact[2]) / 0.7).log_softmax(-1)
    chosen, entropy = log_p.gather(-1, tokens[:, None])[:, 0], -(log_p.exp() * log_p.clamp(min=-1e3)).sum(-1)
    wanted = torch.autograd.grad((chosen[1:] @ slopes[0, 1:].double()) + entropy @ slopes[1].double(), exact)
    settings = LinearLogprobsSettings(0.7, 1024, True, None, True, True, True, fold=fold_block)
    made = FusedLinearLogprobs(hidden, weight, bias, tokens, settings)
    found = made.run(LossGradient(lambda _, __, rows: (slopes[0, rows], slopes[1, rows])))
    scored = FusedLinearLogprobs(hidden, weight, bias, tokens, settings).run(None)
    assert found.logprobs[0] == scored.logprobs[0] == -torch.inf
    for output in (found, scored):
        assert_close(output.logprobs.double(), chosen.detach(), rtol=1e-5, atol=1e-5)
        assert_close(output.entropy.double(), entropy.detach(), rtol=1e-5, atol=1e-5)
    for gradient, expected in zip((found.grad_hidden, found.grad_weight, found.grad_bias), wanted, strict=True):
        assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4)


def layers() -> None:
    """liger's kernels give the states and gradients of a Llama's own modules, in half precision and in float32."""
    model, ids = tiny_llama(), torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    liger_layers.use_liger_layers(model, torch.device("cpu"), torch.float16)
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, FusedModule)}
    assert kinds == {"FusedLlamaRMSNorm", "FusedLlamaMLP", "FusedLlamaAttention"}, kinds
    found, runs, function = [], Counter(), liger_layers.liger_function
    for undo in (False, True):
        if undo:
            use_plain_layers(model)
            assert not any(isinstance(module, FusedModule) for module in model.modules())
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(liger_layers, "liger_function", lambda name: runs.update([name]) or function(name))
            states = model.model(ids).last_hidden_state
        found.append((states, *torch.autograd.grad(states.cos().sum(), list(model.model.parameters()))))
    assert runs == {"norm": 5, "swiglu": 2, "rotary": 2}, runs
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("RLHF_PPO_GPU_KERNELS", "triton")
        patches.setattr(interpreter, "_implicit_cvt", convert)
        patches.setattr("liger_kernel.ops.rms_norm.rsqrt", rsqrt)
        patches.setattr(liger_layers, "TRIAL_TOKENS", 6)
        patches.setattr(liger_layers, "_has_rows", lambda x, dim=1: x.shape[dim] > 1)
        head()
        layers()
