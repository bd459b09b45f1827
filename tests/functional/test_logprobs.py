import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from rlhf_ppo import functional as F
from tests.functional.cases import numbers, seeds


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    weights = [math.exp(x - top) for x in row]
    return [weight / sum(weights) for weight in weights]


def head_and_states(seed: int, n: int) -> tuple[nn.Linear, Tensor, Tensor]:
    head = nn.Linear(4, 7, dtype=torch.float64)
    return head, numbers(seed, n, 4).requires_grad_(), torch.arange(n) * 3 % 7


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def test_token_logprobs_by_hand() -> None:
    """Odds 1 : 3 are probabilities ¼ and ¾; temperature ½ squares the odds to 1 : 9."""
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]]], dtype=torch.float64)
    tokens = torch.tensor([[0, 1]])
    expected = torch.tensor([[math.log(0.25), math.log(0.75)]], dtype=torch.float64)
    assert_close(F.token_logprobs(logits, tokens), expected)
    sharp = torch.tensor([[math.log(0.1), math.log(0.9)]], dtype=torch.float64)
    assert_close(F.token_logprobs(logits, tokens, temperature=0.5), sharp)


@given(seed=seeds, temperature=st.floats(0.1, 5.0))
def test_token_logprobs_and_entropy_equal_a_loop_per_token(seed: int, temperature: float) -> None:
    logits = numbers(seed, 2, 3, 5)
    tokens = torch.arange(6).view(2, 3) % 5
    logprobs = F.token_logprobs(logits, tokens, temperature=temperature)
    entropy = F.entropy_from_logits(logits)
    for row in range(2):
        for step in range(3):
            tempered = softmax((logits[row, step] / temperature).tolist())
            plain = softmax(logits[row, step].tolist())
            assert logprobs[row, step].item() == pytest.approx(math.log(tempered[int(tokens[row, step])]))
            assert entropy[row, step].item() == pytest.approx(-sum(p * math.log(p) for p in plain))


def test_uniform_logits_have_the_entropy_of_the_logarithm_of_the_vocabulary() -> None:
    assert_close(F.entropy_from_logits(torch.zeros(3, 8)), torch.full((3,), math.log(8)))


def test_entropy_gradient_is_minus_p_times_log_p_plus_entropy() -> None:
    logits = numbers(0, 1, 5).requires_grad_()
    (grad,) = gradients(F.entropy_from_logits(logits).sum(), logits)
    p = torch.tensor(softmax(logits[0].tolist()), dtype=torch.float64)
    entropy = -sum(x * math.log(x) for x in p.tolist())
    assert_close(grad[0], -p * (p.log() + entropy))


def test_impossible_tokens_add_nothing_to_entropy_and_no_nan_to_its_gradient() -> None:
    """Top-k sets logits to -inf; 0 · -inf would be nan."""
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    entropy = F.entropy_from_logits(logits)
    (grad,) = gradients(entropy.sum(), logits)
    assert_close(entropy, torch.tensor([math.log(2)]))
    assert_close(grad, torch.zeros(1, 3))


def test_half_precision_logits_are_normalized_in_float32() -> None:
    """bfloat16 has 8 bits: a log-probability near -3 would be off by up to 0.01 nats."""
    logits = torch.randn(2, 50).bfloat16()
    tokens = torch.tensor([3, 4])
    got = F.token_logprobs(logits, tokens)
    assert got.dtype == torch.float32
    assert_close(got.double(), F.token_logprobs(logits.double(), tokens), atol=1e-5, rtol=0)


@settings(max_examples=30)
@given(seed=seeds, n=st.integers(0, 9), chunk_size=st.integers(1, 10), temperature=st.sampled_from([1.0, 0.7]))
def test_chunked_statistics_and_gradients_equal_the_plain_ones(
    seed: int, n: int, chunk_size: int, temperature: float
) -> None:
    head, hidden, tokens = head_and_states(seed, n)
    weights = numbers(seed + 1, n), numbers(seed + 2, n)
    got = F.chunked_token_statistics(head, hidden, tokens, temperature=temperature, chunk_size=chunk_size)
    logits = head(hidden)
    plain = F.token_logprobs(logits, tokens, temperature=temperature), F.entropy_from_logits(logits / temperature)
    assert got.entropy is not None
    assert_close((got.logprobs, got.entropy), plain)
    loss = (got.logprobs * weights[0] + got.entropy * weights[1]).sum()
    expected = (plain[0] * weights[0] + plain[1] * weights[1]).sum()
    inputs = hidden, head.weight, head.bias
    assert_close(gradients(loss, *inputs), gradients(expected, *inputs))


def test_chunked_statistics_of_a_float32_head_agree_to_1e_5() -> None:
    head, hidden, tokens = nn.Linear(16, 300), torch.randn(50, 16, requires_grad=True), torch.arange(50)
    got = F.chunked_token_statistics(head, hidden, tokens, chunk_size=8)
    assert got.entropy is not None
    logits = head(hidden)
    plain = F.token_logprobs(logits, tokens), F.entropy_from_logits(logits)
    assert_close((got.logprobs, got.entropy), plain, atol=1e-5, rtol=0)
    inputs = hidden, head.weight
    got_gradients = gradients((got.logprobs + got.entropy).sum(), *inputs)
    assert_close(got_gradients, gradients((plain[0] + plain[1]).sum(), *inputs), atol=1e-5, rtol=1e-5)


def test_no_pass_asks_the_head_for_more_rows_than_a_chunk_and_backward_asks_again() -> None:
    """The logits are not kept: 10 rows in chunks of 4 cost 3 calls forward and 3 more backward."""
    head, hidden, tokens = head_and_states(0, 10)
    rows = []

    def counted(states: Tensor) -> Tensor:
        rows.append(len(states))
        return head(states)

    statistics = F.chunked_token_statistics(counted, hidden, tokens, chunk_size=4)
    assert rows == [4, 4, 2]
    statistics.logprobs.sum().backward()
    assert sorted(rows) == [2, 2, 4, 4, 4, 4]


def test_kept_memory_does_not_grow_with_the_vocabulary() -> None:
    """What autograd saves for backward is the hidden states, not [tokens, vocab]."""
    head, hidden, tokens = nn.Linear(4, 1000), torch.randn(64, 4, requires_grad=True), torch.arange(64)
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.chunked_token_statistics(head, hidden, tokens, chunk_size=16)
    assert max(saved, default=0) < 16 * 1000


def test_without_entropy_there_is_none_and_without_grad_there_is_no_graph() -> None:
    head, hidden, tokens = head_and_states(0, 5)
    assert F.chunked_token_statistics(head, hidden, tokens, with_entropy=False).entropy is None
    with torch.no_grad():
        assert not F.chunked_token_statistics(head, hidden, tokens).logprobs.requires_grad


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunked_kl_equals_the_plain_one_and_gives_both_sides_their_gradient(chunk_size: int) -> None:
    head, hidden, _ = head_and_states(0, 7)
    ref_head, ref_hidden, _ = head_and_states(5, 7)
    inputs = hidden, ref_hidden, head.weight, ref_head.weight
    plain = F.categorical_kl(head(hidden) / 0.7, ref_head(ref_hidden) / 0.7)
    got = F.chunked_categorical_kl(head, hidden, ref_head, ref_hidden, temperature=0.7, chunk_size=chunk_size)
    assert_close(got, plain)
    assert_close(gradients(got.square().sum(), *inputs), gradients(plain.square().sum(), *inputs))


def test_gradients_agree_with_finite_differences() -> None:
    head, hidden, tokens = head_and_states(0, 3)

    def logprobs_and_entropy(states: Tensor) -> Tensor:
        statistics = F.chunked_token_statistics(head, states, tokens, chunk_size=2)
        assert statistics.entropy is not None
        return torch.cat([statistics.logprobs, statistics.entropy])

    assert torch.autograd.gradcheck(logprobs_and_entropy, hidden)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda head, h, t: F.chunked_token_statistics(head, h, t, temperature=0.0), r"temperature must be > 0, got 0"),
        (lambda head, h, t: F.chunked_token_statistics(head, h, t, chunk_size=0), r"chunk_size must be .*got 0"),
        (lambda head, h, t: F.chunked_token_statistics(head, h, t[:2]), r"got 5 states and 2 tokens"),
        (lambda head, h, t: F.token_logprobs(head(h), t, temperature=-1.0), r"do_sample=False"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_settings_are_refused_with_a_remedy(
    call: Callable[[nn.Module, Tensor, Tensor], object], message: str
) -> None:
    head, hidden, tokens = head_and_states(0, 5)
    with pytest.raises(ValueError, match=message):
        call(head, hidden, tokens)
