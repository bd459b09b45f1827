import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlhf_ppo import functional as F
from tests.functional.cases import numbers, random_mask, seeds, shapes, spoil, steps


def test_kl_shaped_rewards_by_hand() -> None:
    """-0.5 · KL at each action, the score 10 at the last action, 0 outside."""
    kl = torch.tensor([[2.0, 4.0, math.nan], [math.inf, 6.0, 8.0]])
    mask = torch.tensor([[True, True, False], [False, True, True]])
    rewards, non_score = F.kl_shaped_rewards(kl, torch.tensor([10.0, -10.0]), mask, kl_coef=0.5)
    assert_close(rewards, torch.tensor([[-1.0, 8.0, 0.0], [0.0, -3.0, -14.0]]))
    assert_close(non_score, torch.tensor([[-1.0, -2.0, 0.0], [0.0, -3.0, -4.0]]))


@given(seed=seeds, shape=shapes)
def test_kl_shaped_rewards_equal_a_loop_for_scores_per_response_and_per_token(
    seed: int, shape: tuple[int, int]
) -> None:
    mask, kl = random_mask(seed, *shape), numbers(seed, *shape)
    scores, token_scores = numbers(seed + 1, shape[0]), numbers(seed + 2, *shape)
    expected, expected_dense = torch.zeros_like(kl), torch.zeros_like(kl)
    for row, step in steps(mask):
        is_last = not mask[row, step + 1 :].any()
        expected[row, step] = -0.2 * kl[row, step] + (scores[row] if is_last else 0)
        expected_dense[row, step] = -0.2 * kl[row, step] + token_scores[row, step]
    junk = spoil(kl, mask)
    assert_close(F.kl_shaped_rewards(junk, scores, mask, kl_coef=0.2)[0], expected)
    assert_close(F.kl_shaped_rewards(junk, spoil(token_scores, mask), mask, kl_coef=0.2)[0], expected_dense)


def test_a_row_without_actions_or_scores_of_another_shape_are_refused() -> None:
    kl = torch.zeros(2, 3)
    mask = torch.tensor([[True, True, True], [False, False, False]])
    with pytest.raises(ValueError, match=r"row\(s\) \[1\]"):
        F.kl_shaped_rewards(kl, torch.zeros(2), mask, kl_coef=0.1)


@pytest.mark.usefixtures("unchecked")
def test_scores_with_a_trailing_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2,\) or \[batch, time\] = \(2, 3\), got \(2, 1\).*Squeeze"):
        F.kl_shaped_rewards(torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool), kl_coef=0.1)


def test_missing_eos_penalty_replaces_or_subtracts() -> None:
    scores, finished = torch.tensor([3.0, 3.0]), torch.tensor([True, False])
    replaced = F.missing_eos_penalty(scores, finished, penalty=1.0, mode="replace")
    subtracted = F.missing_eos_penalty(scores, finished, penalty=1.0, mode="subtract")
    assert (replaced.tolist(), subtracted.tolist()) == ([3.0, -1.0], [3.0, 2.0])


@pytest.mark.usefixtures("unchecked")
def test_wrong_penalties_and_limits_are_refused() -> None:
    scores, finished = torch.zeros(2), torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"penalty must be >= 0, got -1\.0.*absolute value"):
        F.missing_eos_penalty(scores, finished, penalty=-1.0, mode="replace")
    with pytest.raises(ValueError, match=r"'replace' or 'subtract', got 'both'"):
        F.missing_eos_penalty(scores, finished, penalty=1.0, mode="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"limit must be > 0, got 0\.0"):
        F.clip_scores(scores, 0.0)


def test_clip_scores_cuts_both_sides() -> None:
    assert F.clip_scores(torch.tensor([-5.0, 0.5, 5.0]), 2.0).tolist() == [-2.0, 0.5, 2.0]


@given(
    seed=seeds,
    shape=shapes,
    tails=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    gamma=st.floats(0.5, 1.0),
    lam=st.floats(0.0, 1.0),
)
def test_classic_whiten_rewards_is_gae_over_whitened_padding(
    seed: int, shape: tuple[int, int], tails: list[int], gamma: float, lam: float
) -> None:
    """The padded computation written out per position, with the padding whitened like everything else."""
    batch, time = shape
    rewards, values = numbers(seed, batch, time), numbers(seed + 1, batch, time + 1)
    lengths = [1 + (seed + row) % time for row in range(batch)]
    mask = torch.tensor([[step < length for step in range(time)] for length in lengths])
    kept = rewards[mask].tolist()
    mean = sum(kept) / len(kept)
    std = math.sqrt(sum((x - mean) ** 2 for x in kept) / max(len(kept) - 1, 1) + 1e-8)
    expected = torch.zeros(batch, time, dtype=torch.float64)
    for row, length in enumerate(lengths):
        advantage, next_value = 0.0, 0.0
        for step in reversed(range(length + tails[row])):
            ours = step < length
            reward, value = (rewards[row, step].item(), values[row, step].item()) if ours else (0.0, 0.0)
            advantage = (reward - mean) / std + mean + gamma * next_value - value + gamma * lam * advantage
            next_value = value
            if ours:
                expected[row, step] = advantage
    shaped = F.classic_whiten_rewards(
        spoil(rewards, mask), mask, tail=torch.tensor(tails[:batch]), gamma=gamma, lam=lam
    )
    terminated = torch.arange(time).expand(batch, time) == F.last_action_index(mask).unsqueeze(1)
    advantages, _ = F.gae(shaped, values, terminated, torch.zeros_like(mask), gamma=gamma, lam=lam, mask=mask)
    assert_close(advantages, expected, atol=1e-6, rtol=1e-6)


def test_classic_whiten_rewards_without_tails_is_whitening_with_the_mean_kept() -> None:
    rewards, mask = numbers(0, 3, 4), random_mask(0, 3, 4)
    shaped = F.classic_whiten_rewards(rewards, mask, tail=torch.zeros(3, dtype=torch.long), gamma=1.0, lam=0.95)
    assert_close(shaped, F.whiten(rewards, mask, shift_mean=False))


def test_scores_per_action_are_normalized_by_their_total_and_keep_their_shares() -> None:
    """Totals -1, 0.8, -1 have mean -0.4 and deviation s = √1.08: the mean is paid once an episode.

    Token 2 of the second row is not ours, and the third row is shorter: neither takes part.
    """
    scores = torch.tensor([[-0.5, -0.5, 0.0], [-0.1, 99.0, 0.9], [-1.0, math.nan, math.inf]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, True], [True, False, False]])
    totals = F.total_scores(scores, mask)
    assert_close(totals, torch.tensor([-1.0, 0.8, -1.0], dtype=torch.float64))
    s = math.sqrt(1.08)
    normalized = F.normalize_episode_scores(scores, mask, mean=-0.4, deviation=s)
    expected = torch.tensor([[-0.5, -0.5, 0.4], [-0.1, 0.0, 1.3], [-0.6, 0.0, 0.0]], dtype=torch.float64) / s
    assert_close(normalized, expected)


def test_a_total_beyond_the_limit_shrinks_every_share_by_one_factor() -> None:
    """3 + 5 = 8 is twice the limit 4; -1 + 2 = 1 is within it."""
    scores = torch.tensor([[3.0, 5.0], [-1.0, 2.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    limited = F.normalize_episode_scores(scores, mask, mean=0.0, deviation=1.0, clip=4.0)
    assert limited.tolist() == [[1.5, 2.5], [-1.0, 2.0]]
    with pytest.raises(ValueError, match=r"limit must be > 0, got 0\.0"):
        F.normalize_episode_scores(scores, mask, mean=0.0, deviation=1.0, clip=0.0)


@given(seed=seeds, shape=shapes, mean=st.floats(-3, 3), deviation=st.floats(0.1, 3), clip=st.none() | st.floats(0.1, 5))
def test_normalized_scores_per_action_sum_to_the_normalized_sum(
    seed: int, shape: tuple[int, int], mean: float, deviation: float, clip: float | None
) -> None:
    """And a score at the last action alone is what one number for the episode is."""
    mask, scores = random_mask(seed, *shape), numbers(seed, *shape)
    settings = {"mean": mean, "deviation": deviation, "clip": clip}
    totals = F.total_scores(spoil(scores, mask), mask)
    expected = torch.stack([scores[row][mask[row]].sum() for row in range(shape[0])])
    assert_close(totals, expected)
    one_number = F.normalize_episode_scores(totals, mask, **settings)
    per_token = F.normalize_episode_scores(spoil(scores, mask), mask, **settings)
    assert_close(per_token.sum(dim=1), one_number)
    assert (per_token[~mask] == 0).all()
    at_the_end = torch.zeros_like(scores).scatter(1, F.last_action_index(mask)[:, None], totals[:, None])
    assert_close(
        F.normalize_episode_scores(at_the_end, mask, **settings),
        torch.zeros_like(scores).scatter(1, F.last_action_index(mask)[:, None], one_number[:, None]),
    )
