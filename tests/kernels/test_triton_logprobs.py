"""The softmax of the LM head's blocks by TRL's kernel; its definition stands in for it on the pretended device."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo.functional.logprobs import TokenStatistics
from rlhf_ppo.kernels import triton_logprobs
from rlhf_ppo.kernels.fused_linear_logprobs import fused_token_statistics
from rlhf_ppo.kernels.linear_logprobs import LossGradient
from rlhf_ppo.kernels.triton_logprobs import choose_fold, fold_block
from tests.kernels.test_gpu_trial import set_clock
from tests.support.pretend_cuda import pretend_cuda

VOCAB = 700


class Definition:
    """What TRL's kernel adds up, in torch; its results times a factor."""

    factor = 1.0

    def __getitem__(self, grid: tuple[int]) -> Any:
        return self.launch

    def launch(
        self, *, mm_ptr: Tensor, mm_stride: int, targets_ptr: Tensor, max_ptr: Tensor, sum_exp_ptr: Tensor,
        x_sum_exp_ptr: Tensor, target_logit_ptr: Tensor, vocab_start: int, n_cols: int, logit_scale: float,
        inv_t: float, **unused: Any,
    ) -> None:  # fmt: skip
        assert mm_ptr.dtype == torch.float32
        assert mm_ptr.shape[1] == n_cols
        assert logit_scale == inv_t == 1.0
        largest = mm_ptr.amax(-1, keepdim=True)
        exponentials = (mm_ptr - largest).exp()
        max_ptr.copy_(largest)
        sum_exp_ptr.copy_(self.factor * exponentials.sum(-1, keepdim=True))
        x_sum_exp_ptr.copy_((mm_ptr * exponentials).sum(-1, keepdim=True))
        local = targets_ptr[:, None] - vocab_start
        inside = (local >= 0) & (local < n_cols)
        logits = mm_ptr.gather(-1, local.clamp(0, n_cols - 1))
        target_logit_ptr.copy_(torch.where(inside, logits, target_logit_ptr))


class Wrong(Definition):
    factor = 1.01


class Failing(Definition):
    def launch(self, **_: Any) -> None:
        raise RuntimeError("out of resources: shared memory")


@pytest.fixture(autouse=True)
def _forget_choices() -> Iterator[None]:
    choose_fold.cache_clear()
    yield
    choose_fold.cache_clear()


def statistics(*, bias: bool) -> tuple[TokenStatistics, list[Tensor]]:
    """A head's log-probabilities and entropies on the device, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((9, 16), (VOCAB, 16), (VOCAB,))
    hidden, weight, offset = (torch.randn(shape, generator=generator).cuda() for shape in shapes)
    tokens = (torch.arange(9) * 77).cuda()
    if bias:
        offset[tokens[0]] = offset[5] = -torch.inf
    slopes = torch.linspace(0.0, 1.0, 9).cuda()
    trained = [tensor.requires_grad_() for tensor in ((hidden, weight, offset) if bias else (hidden, weight))]
    found = fused_token_statistics(
        hidden, weight, offset if bias else None, tokens, temperature=0.8, matmul_dtype=torch.bfloat16,
        loss_gradient=LossGradient(lambda _, __, rows: (slopes[rows], 0.1 * slopes[rows])),
    )  # fmt: skip
    assert found.entropy is not None
    loss = (found.logprobs[1:] * slopes[1:]).sum() + (found.entropy * 0.1 * slopes).sum()
    return found, [gradient.cpu() for gradient in torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("bias", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_head_gives_the_same_with_it(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    with pretend_cuda():
        set_clock(monkeypatch, plain=2.0, kernel=1.0)
        found = []
        for kernel in (None, Definition()):
            choose_fold.cache_clear()
            monkeypatch.setattr(triton_logprobs, "kernel", lambda kernel=kernel: kernel)
            scored, gradients = statistics(bias=bias)
            found.append([scored.logprobs.detach().cpu(), scored.entropy.detach().cpu(), *gradients])
        assert choose_fold(torch.device("cuda:0"), VOCAB, torch.bfloat16) is fold_block
    assert bool(found[0][0][0].isinf()) == bias
    assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    assert_close(found[1][1:], found[0][1:], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("kernel", "seconds", "said"),
    [
        pytest.param(Definition(), 1.0, "a Triton kernel (2.00 times as fast)", marks=pytest.mark.slow),
        pytest.param(Definition(), 2.0, "torch (a Triton kernel is 1.00 times as fast)", marks=pytest.mark.slow),
        (Wrong(), 1.0, "torch (a Triton kernel's results differ by"),
        (Failing(), 1.0, "torch (a Triton kernel fails: RuntimeError: out of resources"),
    ],
)
def test_it_is_used_where_it_is_right_and_faster_and_a_line_says_which(
    kernel: Definition, seconds: float, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(triton_logprobs, "kernel", lambda: kernel)
    with pretend_cuda():
        set_clock(monkeypatch, plain=2.0, kernel=seconds)
        device = torch.device("cuda:0")
        for _ in range(2):
            chosen = choose_fold(device, VOCAB, torch.bfloat16)
        assert (chosen is fold_block) == said.startswith("a Triton")
        assert choose_fold(device, VOCAB, torch.float64) is None
    assert choose_fold(torch.device("cpu"), VOCAB, torch.float32) is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"softmax of the LM head on this GPU by {said}")
