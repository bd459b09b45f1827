"""The fused LM head against the plain computation, in float64 where equality is at stake."""

import math
import weakref
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo.functional.logprobs import chunked_token_statistics
from rlhf_ppo.kernels import chunk_sizes, linear_logprobs, matmul
from rlhf_ppo.kernels.fused_linear_logprobs import fused_token_statistics
from rlhf_ppo.kernels.linear_logprobs import LossGradient
from rlhf_ppo.kernels.logits_buffer import LogitsBuffer
from tests.benchmarks.allocations import peak_bytes, returned_bytes

N, HIDDEN, VOCAB = 37, 6, 11


def parts(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return numbers(N, HIDDEN), numbers(VOCAB, HIDDEN), numbers(VOCAB), torch.arange(N) * 3 % VOCAB


def blocks_of(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_sizes, "CPU_SIZES", replace(chunk_sizes.CPU_SIZES, block=tokens))


def loss_of(logprobs: Tensor, entropy: Tensor | None, ent_coef: float, rows: slice = slice(None)) -> Tensor:
    """A curved function of each token, weighed differently."""
    weights = torch.linspace(-1, 2, N, dtype=logprobs.dtype)[rows]
    loss = (weights * (logprobs * 0.3).exp()).sum()
    return loss if entropy is None else loss + ent_coef * (weights * entropy.square()).sum()


def loss_gradient(ent_coef: float) -> LossGradient:
    def found(logprobs: Tensor, entropy: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        leaves = [leaf.detach().requires_grad_() for leaf in (logprobs, entropy) if leaf is not None]
        with torch.enable_grad():
            loss = loss_of(leaves[0], leaves[1] if len(leaves) > 1 else None, ent_coef, rows)
        gradients = torch.autograd.grad(loss, leaves)
        return gradients[0], gradients[1] if len(gradients) > 1 else None

    return LossGradient(found)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor, **settings: Any) -> Any:
    return chunked_token_statistics(lambda h: h @ weight.t() + bias, hidden, tokens, **settings)


@pytest.mark.parametrize("chunk_size", [2, 16, 1000])
@pytest.mark.parametrize("ent_coef", [0.0, 0.7])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_fused_statistics_and_gradients_equal_the_plain_ones(
    chunk_size: int, ent_coef: float, temperature: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`scale` is what loss scaling or the number of processes does to every slope."""
    blocks_of(4, monkeypatch)  # the head is multiplied in blocks
    hidden, weight, bias, tokens = parts()
    settings: dict[str, Any] = {"temperature": temperature, "chunk_size": chunk_size}
    results = []
    for fused in (True, False):
        found = (
            fused_token_statistics(hidden, weight, bias, tokens, loss_gradient=loss_gradient(ent_coef), **settings)
            if fused
            else plain(hidden, weight, bias, tokens, **settings)
        )
        loss = scale * loss_of(found.logprobs, found.entropy, ent_coef)
        results.append([found.logprobs, found.entropy, *torch.autograd.grad(loss, (hidden, weight, bias))])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_head_without_a_bias_is_one_whose_bias_is_zero(with_entropy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits may be written by the product where the probabilities will stand; a last block is not whole."""
    blocks_of(4, monkeypatch)
    hidden, weight, bias, tokens = parts()
    settings: dict[str, Any] = {"with_entropy": with_entropy, "temperature": 0.6, "chunk_size": 16}
    results = []
    for offset, compute in ((None, fused_token_statistics), (torch.zeros_like(bias), plain)):
        given = settings if compute is plain else settings | {"loss_gradient": loss_gradient(0.7 * with_entropy)}
        found = compute(hidden, weight, offset, tokens, **given)
        loss = loss_of(found.logprobs, found.entropy, 0.7)
        results.append([found.logprobs, *torch.autograd.grad(loss, (hidden, weight))])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("ent_coef", [0.0, 0.7])
def test_a_token_in_a_block_without_a_share_keeps_its_gradient(
    ent_coef: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share of its block underflows, even in float64: exp(-800) is 0."""
    blocks_of(4, monkeypatch)
    hidden, weight, _, tokens = parts()
    bias = torch.where(torch.arange(VOCAB) < 4, -800.0, 0.0).double().requires_grad_()
    results: list[list[Any]] = []
    for fused in (True, False):
        found: Any = (
            fused_token_statistics(hidden, weight, bias, tokens, loss_gradient=linear_loss_gradient(ent_coef))
            if fused
            else plain(hidden, weight, bias, tokens)
        )
        loss = (found.logprobs + ent_coef * found.entropy).sum()
        results.append([found.logprobs, found.entropy, *torch.autograd.grad(loss, (hidden, weight, bias))])
    assert float(results[0][0].detach().min()) < -700
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_block_without_a_share_spoils_no_gradient_in_half_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands for the logarithm of nothing must be a number there, too: inf x 0 is nan."""
    blocks_of(4, monkeypatch)
    hidden, weight, _, tokens = parts(torch.float32)
    bias = torch.where(torch.arange(VOCAB) < 4, -800.0, 0.0).requires_grad_()
    gradients = []
    for fused in (True, False):
        found: Any = (
            fused_token_statistics(
                hidden, weight, bias, tokens, loss_gradient=linear_loss_gradient(0.7), matmul_dtype=dtype
            )
            if fused
            else plain(hidden, weight, bias, tokens)
        )
        gradients.append(torch.autograd.grad((found.logprobs + 0.7 * found.entropy).sum(), (hidden, weight, bias)))
    for ours, theirs in zip(*gradients, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


@pytest.mark.parametrize("ent_coef", [0.0, 0.7])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.float16])
def test_derivatives_below_the_range_of_float16_are_kept(ent_coef: float, hidden_dtype: torch.dtype) -> None:
    """The scale of the loss is applied to the gradients, after the products."""
    hidden, weight, bias, tokens = (*(part.detach() for part in parts(torch.float32)[:3]), parts()[3])
    hidden, weight, bias = hidden.to(hidden_dtype).requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    small, scale = 1e-9, 2.0**16
    gradients = []
    for dtype in (torch.float16, torch.float32):
        states = hidden if dtype == torch.float16 else hidden.float()
        given = LossGradient(lambda logprobs, entropy, _: (
            torch.full_like(logprobs, small), None if entropy is None else torch.full_like(entropy, small * ent_coef)
        ))  # fmt: skip
        found = fused_token_statistics(states, weight, bias, tokens, loss_gradient=given, matmul_dtype=dtype)
        loss = small * scale * (found.logprobs + ent_coef * found.entropy).sum()
        gradients.append(torch.autograd.grad(loss, (hidden, weight, bias)))
    for ours, theirs in zip(*gradients, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 0.02


def linear_loss_gradient(ent_coef: float) -> LossGradient:
    """Of the sum of log-probabilities and weighed entropies."""
    return LossGradient(lambda logprobs, entropy, _: (
        torch.ones_like(logprobs), None if entropy is None else torch.full_like(entropy, ent_coef)
    ))  # fmt: skip


@pytest.mark.parametrize("block", [4, 4096])
def test_a_sure_token_has_a_small_gradient_in_bfloat16_too(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 cannot tell 0.9995 from 1: what is kept is p - 1."""
    blocks_of(block, monkeypatch)
    hidden, weight, _, tokens = parts(torch.float32)
    bias = torch.zeros(VOCAB).index_fill_(0, tokens[:1], 12.0)
    gradients = []
    for fused in (True, False):
        given = (hidden[:1], 0.1 * weight, bias, tokens[:1])
        found = (
            fused_token_statistics(*given, loss_gradient=linear_loss_gradient(0.0), matmul_dtype=torch.bfloat16)
            if fused
            else plain(*given)
        )
        assert -1e-3 < float(found.logprobs.detach()) < -1e-5
        gradients.append(torch.autograd.grad(found.logprobs.sum(), weight)[0])
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 0.02


def without_reading(given: LossGradient, asked: list[Tensor | None]) -> LossGradient:
    """The same loss_gradient, who say that they need no entropy; what they got goes into `asked`."""

    def at(logprobs: Tensor, entropy: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        asked.append(entropy)
        return given.at(logprobs, entropy, rows)

    return LossGradient(at, reads_entropy=False)


@pytest.mark.parametrize("chunk_size", [3, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("trains_weight", [True, False])
def test_the_entropy_that_no_slope_reads_comes_from_the_gradients_products(
    chunk_size: int, temperature: float, trains_weight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a token whose own slope is 0."""
    blocks_of(4, monkeypatch)
    hidden, weight, _, tokens = parts()
    weight.requires_grad_(trains_weight)
    asked: list[Tensor | None] = []
    weights = torch.linspace(-1, 2, N, dtype=hidden.dtype) * (torch.arange(N) % 3 > 0)
    foreseen = without_reading(LossGradient(lambda logprobs, _, rows: (weights[rows], None)), asked)
    settings: dict[str, Any] = {"temperature": temperature, "chunk_size": chunk_size}
    found = fused_token_statistics(hidden, weight, None, tokens, loss_gradient=foreseen, **settings)
    exact: Any = chunked_token_statistics(lambda h: h @ weight.t(), hidden, tokens, **settings)
    assert asked == [None] * len(asked) and len(asked) == math.ceil(N / chunk_size)
    leaves = [hidden, weight] if trains_weight else [hidden]
    ours, theirs = (torch.autograd.grad((weights * result.logprobs).sum(), leaves) for result in (found, exact))
    assert_close((found.logprobs, found.entropy, *ours), (exact.logprobs, exact.entropy, *theirs))


def test_an_entropy_taken_late_is_as_exact_far_from_zero_and_vanishes_for_a_sure_token() -> None:
    """Logits around -100, as GPT-2 has them, which come from one wide dimension of the states."""
    hidden, weight, _, tokens = (part.detach() for part in parts())
    hidden, weight = (
        torch.cat([hidden, torch.full((N, 1), 50.0)], 1),
        torch.cat([weight, torch.full((VOCAB, 1), -2.0)], 1),
    )
    hidden[0] = 40 * weight[tokens[0]]  # nothing else has a probability
    hidden[0, -1] = 50.0
    exact = chunked_token_statistics(lambda h: h @ weight.double().t(), hidden.double(), tokens)
    for late in (True, False):
        slope = linear_loss_gradient(0.0)
        given = (hidden.float().requires_grad_(), weight.float().requires_grad_(), None, tokens)
        found = fused_token_statistics(*given, loss_gradient=without_reading(slope, []) if late else slope)
        assert exact.entropy is not None and found.entropy is not None
        assert float(exact.entropy[0]) < 1e-12
        assert abs(float(found.entropy[0].detach())) < (1e-12 if late else 1e-4)
        assert_close(found.entropy.double(), exact.entropy, rtol=1e-5, atol=1e-4)


def test_an_entropy_waits_for_no_product_in_bfloat16_and_none_that_is_not_made() -> None:
    hidden, weight, bias, tokens = parts(torch.float32)
    for asked, dtype in (
        ((hidden, weight, None, tokens), torch.bfloat16),
        ((hidden.detach(), weight, None, tokens), None),
        ((hidden, weight, bias, tokens), None),
    ):
        slope, results = linear_loss_gradient(0.0), []
        for foreseen in (slope, without_reading(slope, [])):
            found = fused_token_statistics(*asked, loss_gradient=foreseen, matmul_dtype=dtype)
            assert found.entropy is not None
            results.append(found.entropy)
        assert torch.equal(*results)


@pytest.mark.parametrize(
    "foreseen", [LossGradient(lambda logprobs, _, __: (torch.ones_like(logprobs), torch.ones_like(logprobs)), False),
                 LossGradient(lambda logprobs, _, __: (torch.ones_like(logprobs), None), False)]
)  # fmt: skip
def test_slopes_that_were_wrong_about_the_entropy_are_corrected(foreseen: LossGradient) -> None:
    hidden, weight, _, tokens = parts()
    found = fused_token_statistics(hidden, weight, None, tokens, loss_gradient=foreseen)
    exact = chunked_token_statistics(lambda h: h @ weight.t(), hidden, tokens)
    gradients = [
        torch.autograd.grad((result.logprobs + result.entropy).sum(), (hidden, weight)) for result in (found, exact)
    ]
    assert_close(*gradients)


def test_a_loss_that_is_no_sum_over_tokens_still_gets_its_own_gradient() -> None:
    hidden, weight, bias, tokens = parts()
    gradients = []
    for fused in (True, False):
        found = (
            fused_token_statistics(hidden, weight, bias, tokens, loss_gradient=loss_gradient(0.0))
            if fused
            else plain(hidden, weight, bias, tokens)
        )
        loss = found.logprobs.mean().exp() * found.logprobs[0]  # not what `loss_gradient` says
        gradients.append(torch.autograd.grad(loss, (hidden, weight, bias)))
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a product."""
    calls: list[int] = []

    def counted(a: Tensor, b: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        calls.append(1)
        return a @ b if bias is None else torch.addmm(bias, a, b)

    monkeypatch.setattr(linear_logprobs, "matmul", counted)
    return calls


def test_a_foreseen_gradient_multiplies_three_times_and_another_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, and one product for each gradient, in each of two chunks; the plain way has four."""
    monkeypatch.setattr(chunk_sizes, "CPU_SIZES", replace(chunk_sizes.CPU_SIZES, probabilities=1))
    monkeypatch.setattr(chunk_sizes, "MIN_EXTRA_ROWS", N - HIDDEN - 1)
    calls = counting(monkeypatch)
    hidden, weight, bias, tokens = parts()
    found = fused_token_statistics(hidden, weight, bias, tokens, loss_gradient=loss_gradient(0.0), with_entropy=False)
    loss_of(found.logprobs, None, 0.0).backward()
    assert len(calls) == 2 * 3
    found = fused_token_statistics(hidden, weight, bias, tokens, loss_gradient=loss_gradient(0.0), with_entropy=False)
    found.logprobs[3].backward()
    assert len(calls) == 2 * 3 + 2 * 6


def test_a_frozen_head_or_trunk_gets_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counting(monkeypatch)
    hidden, weight, _, tokens = parts()
    found = fused_token_statistics(
        hidden, weight.detach(), None, tokens, loss_gradient=loss_gradient(0.0), with_entropy=False
    )
    loss_of(found.logprobs, None, 0.0).backward()
    assert len(calls) == 2 and weight.grad is None and hidden.grad is not None


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_states_are_normalized_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    exact = plain(*parts())
    found = fused_token_statistics(*parts(dtype), loss_gradient=loss_gradient(0.0))
    assert found.logprobs.dtype == torch.float32
    assert_close(found.logprobs.double(), exact.logprobs, rtol=tolerance, atol=tolerance)


def test_impossible_tokens_make_no_nan() -> None:
    hidden, weight, bias, tokens = parts()
    with torch.no_grad():
        bias[5] = -math.inf
    possible = torch.where(tokens == 5, 4, tokens)
    found = fused_token_statistics(hidden, weight, bias, possible, loss_gradient=loss_gradient(0.7))
    loss_of(found.logprobs, found.entropy, 0.7).backward()
    assert found.entropy is not None and found.entropy.isfinite().all()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_no_tokens_give_zero_gradients() -> None:
    hidden, weight, bias, _ = parts()
    nobody = LossGradient(lambda logprobs, entropy, rows: (logprobs, entropy))
    found = fused_token_statistics(hidden[:0], weight, bias, torch.zeros(0, dtype=torch.long), loss_gradient=nobody)
    found.logprobs.sum().backward()
    assert weight.grad is not None and float(weight.grad.abs().sum()) == 0.0


def test_kept_memory_does_not_grow_with_the_vocabulary_times_the_tokens() -> None:
    """What waits for the backward pass is the gradient of states and head, never [tokens, vocabulary]."""
    hidden, weight, bias, tokens = parts()
    found = fused_token_statistics(hidden, weight, bias, tokens, loss_gradient=loss_gradient(0.0))
    kept = found.logprobs.grad_fn.output  # type: ignore[union-attr]
    sizes = [value.numel() for value in vars(kept).values() if isinstance(value, Tensor)]
    assert max(sizes) == max(N * HIDDEN, VOCAB * HIDDEN) < N * VOCAB


@pytest.mark.parametrize("by_onednn", [False, True])
@torch.no_grad()
def test_scoring_holds_one_block_of_logits_whatever_the_vocabulary_and_the_rows(
    by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits, their probabilities, and what a product takes: a result of its own where oneDNN makes it."""
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: by_onednn)

    def peak(rows: int, blocks: int) -> int:
        hidden, weight = torch.randn(rows, 16), torch.randn(blocks * chunk_sizes.CPU_SIZES.block, 16)
        tokens = torch.arange(rows)
        return peak_bytes(lambda: fused_token_statistics(hidden, weight, None, tokens, loss_gradient=None))

    block = chunk_sizes.CPU_SIZES.scoring_logits
    small, large = peak(256, 2), peak(1000, 16)
    assert small == pytest.approx(large, rel=0.05)
    assert large < (4 if by_onednn else 3) * block


def test_training_holds_the_heads_gradient_and_the_fewest_rows_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece, however many chunks there are."""
    monkeypatch.setattr(chunk_sizes, "CPU_SIZES", replace(chunk_sizes.CPU_SIZES, probabilities=1))
    block, chunk, rows = chunk_sizes.CPU_SIZES.block, chunk_sizes.MIN_EXTRA_ROWS, 3 * chunk_sizes.MIN_EXTRA_ROWS
    vocab = 16 * block
    hidden, weight = (torch.randn(n, 16, requires_grad=True) for n in (rows, vocab))
    tokens = torch.arange(rows)

    asked = partial(fused_token_statistics, loss_gradient=linear_loss_gradient(0.0), with_entropy=False)
    peak = peak_bytes(lambda: asked(hidden, weight, None, tokens))
    gradient, kept = 4 * weight.numel(), 4 * chunk * vocab
    assert gradient + kept < peak < gradient + kept + 4 * 3 * (chunk + 16) * block


@pytest.mark.slow
def test_beside_the_heads_gradient_training_holds_no_more_at_four_times_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Up to 128,000 tokens, of which the fewest rows of a chunk fill what is allowed; here it is a sixteenth."""
    real = chunk_sizes.CPU_SIZES
    assert 0.98 * real.probabilities < 4 * chunk_sizes.MIN_EXTRA_ROWS * 128_000 < 1.02 * real.probabilities
    monkeypatch.setattr(
        chunk_sizes,
        "CPU_SIZES",
        replace(real, probabilities=4 * chunk_sizes.MIN_EXTRA_ROWS * 8000, block=real.block // 16),
    )

    def peak(vocab: int) -> int:
        hidden, weight = (torch.randn(n, 16, requires_grad=True) for n in (1024, vocab))
        tokens = torch.arange(1024)

        slope = LossGradient(lambda logprobs, entropy, _: (torch.ones_like(logprobs), entropy))
        return (
            peak_bytes(lambda: fused_token_statistics(hidden, weight, None, tokens, loss_gradient=slope)) - 64 * vocab
        )

    assert peak(8000) < 1.02 * peak(2000)


def test_probabilities_do_not_wait_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[weakref.ref[linear_logprobs.FusedLinearLogprobs]] = []
    run = linear_logprobs.FusedLinearLogprobs.run

    def noted(
        self: linear_logprobs.FusedLinearLogprobs, loss_gradient: LossGradient | None
    ) -> linear_logprobs.HeadOutput:
        walks.append(weakref.ref(self))
        return run(self, loss_gradient)

    monkeypatch.setattr(linear_logprobs.FusedLinearLogprobs, "run", noted)
    result = fused_token_statistics(*parts(), loss_gradient=loss_gradient(0.0), with_entropy=False)
    assert result.logprobs.requires_grad
    assert [walk() for walk in walks] == [None]


def test_chunks_of_a_large_vocabulary_keep_so_many_rows_that_its_gradient_is_rarely_walked_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first has what the gradient has room for and the least beyond; those behind it are of one size, 10 and 9."""
    monkeypatch.setattr(chunk_sizes, "CPU_SIZES", replace(chunk_sizes.CPU_SIZES, probabilities=1))
    monkeypatch.setattr(chunk_sizes, "MIN_EXTRA_ROWS", 12)
    assert chunks_of(*parts()) == [HIDDEN + 12, 10, 9]


def chunks_of(*given: Any, **settings: Any) -> list[int]:
    """Rows of each chunk."""
    sizes: list[int] = []

    def noted(logprobs: Tensor, entropy: Tensor | None, rows: slice) -> tuple[Tensor, None]:
        sizes.append(len(logprobs))
        return torch.ones_like(logprobs), None

    fused_token_statistics(*given, loss_gradient=LossGradient(noted), **settings)
    return sizes


def test_the_heads_gradient_has_room_for_the_probabilities_of_as_many_tokens_as_a_state_is_wide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row of 6 float32 numbers is as wide as 12 in bfloat16. Where the two share no memory, all stand beside."""
    monkeypatch.setattr(chunk_sizes, "CPU_SIZES", replace(chunk_sizes.CPU_SIZES, probabilities=1))
    monkeypatch.setattr(chunk_sizes, "MIN_EXTRA_ROWS", 20)
    hidden, weight, bias, tokens = parts(torch.float32)
    assert chunks_of(hidden, weight, bias, tokens) == [6 + 20, 11]
    assert chunks_of(hidden, weight, bias, tokens, matmul_dtype=torch.bfloat16) == [12 + 20, 5]
    assert chunks_of(hidden, weight, bias, tokens, matmul_dtype=torch.float64) == [19, 18]
    assert chunks_of(hidden, weight.detach(), bias, tokens) == [19, 18]
    assert chunks_of(hidden, weight, bias, tokens, chunk_size=5) == [5] * 7 + [2]


@given(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 6), st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_a_blocks_gradient_is_written_where_no_probability_is_waited_for(
    vocab: int, block: int, hidden: int, sizes: list[int], dtype: torch.dtype
) -> None:
    """Each block's gradient in turn: probabilities of later blocks stay; its own have been read by then."""
    stops = torch.tensor(sizes).cumsum(0).tolist()
    chunks = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
    buffer = LogitsBuffer(torch.zeros(vocab, hidden, dtype=dtype), block, torch.float32)
    buffer.allocate(chunks)
    assert buffer.gradient is not None and [buffer.overlaps_gradient(rows) for rows in chunks] == [True] + [False] * (
        len(sizes) - 1
    )
    place = buffer.probabilities(chunks[0]).fill_(1.0)
    for number in range(buffer.blocks):
        buffer.gradient[number * block : (number + 1) * block] = math.nan
        assert bool((place[number + 1 :] == 1).all())
    buffer.gradient.zero_()
    for rows in chunks[1:]:
        buffer.probabilities(rows).fill_(1.0)
    assert bool((buffer.gradient == 0).all())


@pytest.mark.parametrize("rows, block", [(100, 4000), (1024, 2000), (8000, 1016)])
def test_many_rows_go_by_smaller_blocks(rows: int, block: int) -> None:
    """8 MiB of logits at a time, but no fewer tokens than a tile has: 63 blocks of a vocabulary of 64,000."""
    hidden, weight = torch.randn(rows, 2), torch.randn(64_000, 2)
    settings = linear_logprobs.LinearLogprobsSettings(1.0, 10_000, False, None, True, True, False)
    walk = linear_logprobs.FusedLinearLogprobs(hidden, weight, None, torch.zeros(rows, dtype=torch.long), settings)
    assert walk._block_size(training=True) == block
    assert walk._block_size(training=False) == 4000


@pytest.mark.parametrize("by_onednn", [False, True])
def test_beyond_the_heads_gradient_stand_only_the_rows_that_a_state_is_not_wide_enough_for(
    by_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside two of one block, of which there are 16: its logits, their probabilities, the product of its gradient."""
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: by_onednn)
    block = chunk_sizes.CPU_SIZES.block
    for rows, beyond in ((16, 0), (80, 16 * 16)):
        hidden, weight = (torch.randn(n, 64, requires_grad=True) for n in (rows, 16 * block))
        asked = partial(fused_token_statistics, hidden, weight, None, torch.arange(rows))
        peak = peak_bytes(partial(asked, loss_gradient=linear_loss_gradient(0.0)))
        assert 0 < peak - 4 * (weight.numel() + beyond * block) < 1.1 * 4 * max(2 * rows, rows + 64) * block


def test_a_second_backward_pass_is_refused() -> None:
    found = fused_token_statistics(*parts(), loss_gradient=loss_gradient(0.0))
    loss = loss_of(found.logprobs, found.entropy, 0.0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="got a second"):
        loss.backward()


def test_an_impossible_token_has_no_probability_and_leaves_the_entropy_finite() -> None:
    hidden, weight, bias, tokens = parts()
    barred = torch.zeros(VOCAB, dtype=bias.dtype)
    barred[tokens[0]] = -torch.inf
    results: list[Any] = []
    for compute in (lambda *given: fused_token_statistics(*given, loss_gradient=loss_gradient(0.0)), plain):
        found = compute(hidden, weight, bias + barred, tokens)
        results.append((found.logprobs, found.entropy))
    assert results[0][0][0] == -torch.inf and bool(results[0][1].isfinite().all())
    assert_close(results[0], results[1])


@pytest.mark.parametrize("matmul_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
def test_logits_and_products_of_a_block_lie_where_those_of_the_block_before_have_stood(
    monkeypatch: pytest.MonkeyPatch, trained: bool, matmul_dtype: torch.dtype | None
) -> None:
    """Twelve blocks more bring no other tensors to life than their share of those of the head's size, and numbers."""
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: False)  # its results lie elsewhere
    rows, width, block = 32, 8, 2048
    monkeypatch.setattr(
        chunk_sizes, "CPU_SIZES", replace(chunk_sizes.CPU_SIZES, block=block, scoring_logits=4 * rows * block)
    )

    def allocated(blocks: int) -> int:
        hidden, weight = (torch.randn(n, width, requires_grad=trained) for n in (rows, blocks * block))
        slope = linear_loss_gradient(0.0) if trained else None
        asked = partial(fused_token_statistics, loss_gradient=slope, matmul_dtype=matmul_dtype, with_entropy=False)
        with torch.set_grad_enabled(trained):
            return returned_bytes(partial(asked, hidden, weight, None, torch.arange(rows)))

    low = 2 if matmul_dtype is not None else 4
    sized = low * block * width if matmul_dtype is not None else 0  # the head in that precision
    # Probabilities with the head's gradient in one piece, which is no shorter than the gradient.
    sized += block * max(low * rows, 4 * width) if trained else 0
    grown = allocated(16) - allocated(4) - 12 * sized
    assert 0 <= grown < 12 * 0.1 * low * rows * block
