"""Inversion of the cumulative distribution: right frequencies, right log-probabilities, nothing impossible."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo.samplers.token_sampling import BLOCK, greedy_tokens, sample_tokens

DRAWS = 40_000


def chi_square_z(counts: Tensor, probabilities: Tensor) -> float:
    """(χ² - df) / √(2 df) over the cells that expect five draws or more, the rest pooled: near N(0, 1) if they fit."""
    expected = probabilities.double() * counts.sum()
    big = expected >= 5
    observed, wanted = counts[big].double(), expected[big]
    if expected[~big].sum() >= 5:
        observed = torch.cat([observed, counts[~big].sum()[None].double()])
        wanted = torch.cat([wanted, expected[~big].sum()[None]])
    df = len(wanted) - 1
    return float((((observed - wanted) ** 2 / wanted).sum() - df) / math.sqrt(2 * df))


def draw_many(logits: Tensor) -> Tensor:
    uniforms = torch.rand(DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, _ = sample_tokens(logits.expand(DRAWS, -1).clone(), uniforms)
    return tokens


@pytest.mark.parametrize("vocab", [5, BLOCK, BLOCK + 1, 3 * BLOCK, 1000])
def test_frequencies_fit_the_distribution_and_an_off_by_one_would_not(vocab: int) -> None:
    """A token drawn one place too high or too low is what a wrong inequality in the search would give."""
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    probabilities = logits.double().softmax(dim=1)[0]
    tokens = draw_many(logits)
    assert abs(chi_square_z(tokens.bincount(minlength=vocab), probabilities)) < 4
    for shift in (-1, 1):
        wrong = ((tokens + shift) % vocab).bincount(minlength=vocab)
        assert chi_square_z(wrong, probabilities) > 100


def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_uniform() -> None:
    """p = (1/4, 1/4, 1/2): u in [0, 1/4) gives 0, [1/4, 1/2) gives 1, the rest 2; log p = log of the three."""
    logits = torch.tensor([0.25, 0.25, 0.5]).log().expand(6, 3).clone()
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.4999, 0.5001, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, uniforms)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    assert_close(logprobs, torch.tensor([0.25, 0.25, 0.25, 0.25, 0.5, 0.5]).log())


@pytest.mark.parametrize("allowed", [[0], [BLOCK - 1], [BLOCK], [2 * BLOCK + 2], [3, 4], [BLOCK - 1, 2 * BLOCK]])
def test_a_masked_token_is_never_drawn_whatever_the_uniform(allowed: list[int]) -> None:
    vocab = 2 * BLOCK + 3
    logits = torch.full((64, vocab), -math.inf)
    logits[:, allowed] = torch.randn(64, len(allowed))
    ends = torch.tensor([0.0, 5e-324, 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    uniforms = torch.cat([ends, torch.rand(59, dtype=torch.float64)])
    tokens, logprobs = sample_tokens(logits, uniforms)
    assert set(tokens.tolist()) <= set(allowed)
    assert bool(logprobs.isfinite().all())


def test_log_probabilities_are_those_of_the_softmax_in_float64() -> None:
    logits = torch.randn(32, 5000) * 5 + 300
    tokens, logprobs = sample_tokens(logits.clone(), torch.rand(32, dtype=torch.float64))
    truth = logits.double().log_softmax(dim=1).gather(1, tokens[:, None]).squeeze(1)
    assert_close(logprobs.double(), truth, atol=2e-6, rtol=0)
    assert logprobs.dtype == torch.float32


def test_rows_do_not_see_each_other() -> None:
    logits, uniforms = torch.randn(8, 700), torch.rand(8, dtype=torch.float64)
    together = sample_tokens(logits.clone(), uniforms)[0]
    apart = [sample_tokens(logits[i : i + 1].clone(), uniforms[i : i + 1])[0] for i in range(8)]
    assert together.tolist() == [int(token) for token in apart]


def test_the_best_token_is_the_mode_with_its_log_probability() -> None:
    logits = torch.randn(4, 50)
    tokens, logprobs = greedy_tokens(logits)
    assert tokens.tolist() == logits.argmax(dim=1).tolist()
    assert_close(logprobs, logits.log_softmax(dim=1).amax(dim=1))
