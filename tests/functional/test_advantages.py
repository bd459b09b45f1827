import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo import functional as F
from tests.functional.cases import JUNK, numbers, random_mask, seeds, shapes, spoil

unit = st.floats(0.0, 1.0)


def flags(seed: int, batch: int, time: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 7)
    kinds = torch.randint(6, (batch, time), generator=generator)
    return kinds == 0, kinds == 1


def loop(rewards, values, terminated, truncated, mask, gamma, lam):  # type: ignore[no-untyped-def]
    """GAE by its definition, Â_t = Σ_k (γλ)^k δ_{t+k}, over the list of a row's own actions; None elsewhere."""
    batch, time = rewards.shape
    result = [[None] * time for _ in range(batch)]
    for row in range(batch):
        ours = [step for step in range(time) if mask[row, step]]
        deltas = []
        for position, step in enumerate(ours):
            cut = bool(truncated[row, step]) or position + 1 == len(ours)
            behind = step + 1 if cut else ours[position + 1]
            future = 0.0 if terminated[row, step] else values[row, behind].item()
            deltas.append(rewards[row, step].item() + gamma * future - values[row, step].item())
        for position, step in enumerate(ours):
            total = 0.0
            for k in range(len(ours) - position):
                total += (gamma * lam) ** k * deltas[position + k]
                here = ours[position + k]
                if terminated[row, here] or truncated[row, here]:
                    break
            result[row][step] = total
    return result


def test_gae_by_hand() -> None:
    """γ = ½, λ = ½, V = 1, r = 1: δ_1 = 1 + 0 - 1 = 0 (terminated), δ_0 = 1 + ½ - 1 = ½, Â_0 = ½ + ¼ · 0."""
    rewards, values = torch.ones(1, 2), torch.ones(1, 3)
    terminated, never = torch.tensor([[False, True]]), torch.zeros(1, 2, dtype=torch.bool)
    advantages, returns = F.gae(rewards, values, terminated, never, gamma=0.5, lam=0.5)
    assert_close((advantages, returns), (torch.tensor([[0.5, 0.0]]), torch.tensor([[1.5, 1.0]])))
    # Truncated instead: δ_1 = 1 + ½ - 1 = ½, Â_0 = ½ + ¼ · ½.
    advantages, _ = F.gae(rewards, values, never, terminated, gamma=0.5, lam=0.5)
    assert_close(advantages, torch.tensor([[0.625, 0.5]]))


@given(seed=seeds, shape=shapes, gamma=unit, lam=unit)
def test_gae_equals_its_definition_for_any_mask_and_flags(
    seed: int, shape: tuple[int, int], gamma: float, lam: float
) -> None:
    rewards, values = numbers(seed, *shape), numbers(seed + 1, shape[0], shape[1] + 1)
    terminated, truncated = flags(seed, *shape)
    mask = random_mask(seed, *shape)
    advantages, returns = F.gae(rewards, values, terminated, truncated, gamma=gamma, lam=lam, mask=mask)
    expected = loop(rewards, values, terminated, truncated, mask, gamma, lam)
    for row, line in enumerate(expected):
        for step, advantage in enumerate(line):
            assert advantages[row, step].item() == pytest.approx(advantage or 0.0, abs=1e-9)
            target = 0.0 if advantage is None else advantage + values[row, step].item()
            assert returns[row, step].item() == pytest.approx(target, abs=1e-9)


@given(seed=seeds, shape=shapes)
def test_gae_reads_no_junk_in_masked_steps_nor_behind_a_terminated_end(seed: int, shape: tuple[int, int]) -> None:
    batch, time = shape
    mask = random_mask(seed, *shape)
    rewards, values = numbers(seed, *shape), numbers(seed + 1, batch, time + 1)
    terminated = torch.arange(time).expand(batch, time) == F.last_action_index(mask).unsqueeze(1)
    truncated = torch.zeros_like(mask)
    clean = F.gae(rewards, values, terminated, truncated, gamma=0.9, lam=0.8, mask=mask)
    with_end = torch.cat([mask, torch.zeros(batch, 1, dtype=torch.bool)], dim=1)
    wild = ~mask & (numbers(seed + 2, *shape) > 0)
    spoiled = F.gae(
        spoil(rewards, mask), spoil(values, with_end), terminated | wild, truncated | wild.flip(0) & ~mask,
        gamma=0.9, lam=0.8, mask=mask,
    )  # fmt: skip
    assert_close(spoiled, clean)


@pytest.mark.parametrize("junk", JUNK)
def test_nothing_behind_an_end_inside_a_row_is_read(junk: float) -> None:
    """Two episodes in a row: the first ends in step 1, so its advantages do not know the second."""
    rewards, values = numbers(0, 1, 4), numbers(1, 1, 5)
    terminated = torch.tensor([[False, True, False, True]])
    never = torch.zeros_like(terminated)
    clean, _ = F.gae(rewards, values, terminated, never, gamma=0.9, lam=0.9)
    rewards[0, 2:], values[0, 2:] = junk, junk
    spoiled, _ = F.gae(rewards, values, terminated, never, gamma=0.9, lam=0.9)
    assert_close(spoiled[:, :2], clean[:, :2])


def test_a_tool_gap_is_passed_over_without_decay() -> None:
    """V = 1 and a final reward of 1 at γ = 1 leave nothing to correct: every target is 1.

    The classic trainer ran through the gap with V = 0 there and returned .907, .9025, .95, 1, 1.
    """
    mask = torch.tensor([[True, True, False, False, True]])
    rewards = torch.tensor([[0.0, 0.0, 9.0, 9.0, 1.0]])
    terminated = torch.tensor([[False, False, False, False, True]])
    values = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 7.0]])
    _, returns = F.gae(rewards, values, terminated, torch.zeros_like(mask), gamma=1.0, lam=0.95, mask=mask)
    assert_close(returns, mask.float())


@given(seed=seeds, shape=shapes, gamma=unit, lam=unit)
def test_dropping_masked_columns_changes_nothing(seed: int, shape: tuple[int, int], gamma: float, lam: float) -> None:
    """A gap is as if its steps had never been there, when the row ends terminated."""
    time = shape[1]
    mask = random_mask(seed, 1, time)
    rewards, values = numbers(seed, 1, time), numbers(seed + 1, 1, time + 1)
    terminated = torch.arange(time).view(1, time) == F.last_action_index(mask).unsqueeze(1)
    ours = mask[0].nonzero().flatten()
    kept = torch.cat([ours, torch.tensor([time])])
    gapped, _ = F.gae(rewards, values, terminated, torch.zeros_like(mask), gamma=gamma, lam=lam, mask=mask)
    dense, _ = F.gae(
        rewards[:, ours], values[:, kept], terminated[:, ours], torch.zeros_like(mask[:, ours]), gamma=gamma, lam=lam
    )
    assert_close(gapped[:, ours], dense)


@given(seed=seeds, shape=shapes, gamma=unit)
def test_lambda_zero_is_the_one_step_error_and_lambda_one_the_monte_carlo_return(
    seed: int, shape: tuple[int, int], gamma: float
) -> None:
    rewards, values = numbers(seed, *shape), numbers(seed + 1, shape[0], shape[1] + 1)
    terminated, truncated = flags(seed, *shape)
    td, _ = F.gae(rewards, values, terminated, truncated, gamma=gamma, lam=0.0)
    assert_close(td, rewards + gamma * values[:, 1:] * ~terminated - values[:, :-1])
    _, targets = F.gae(rewards, values, terminated, truncated, gamma=gamma, lam=1.0)
    assert_close(targets, F.discounted_returns(rewards, terminated, truncated, gamma=gamma, values=values))


def test_a_lambda_per_row_equals_each_row_alone() -> None:
    rewards, values = numbers(0, 3, 5), numbers(1, 3, 6)
    terminated, truncated = flags(0, 3, 5)
    lam = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    together, _ = F.gae(rewards, values, terminated, truncated, gamma=0.9, lam=lam)
    for row in range(3):
        one = slice(row, row + 1)
        alone, _ = F.gae(
            rewards[one], values[one], terminated[one], truncated[one], gamma=0.9, lam=float(lam[row])
        )  # fmt: skip
        assert_close(together[one], alone)


def test_advantages_and_targets_carry_no_gradient() -> None:
    """A value loss through its own target would let the critic move the goal."""
    values = torch.zeros(1, 3, requires_grad=True)
    never = torch.zeros(1, 2, dtype=torch.bool)
    advantages, returns = F.gae(torch.ones(1, 2), values, never, never, gamma=1.0, lam=1.0)
    assert not advantages.requires_grad and not returns.requires_grad


def test_a_rollout_without_steps_has_no_advantages() -> None:
    never = torch.zeros(2, 0, dtype=torch.bool)
    advantages, returns = F.gae(torch.zeros(2, 0), torch.zeros(2, 1), never, never, gamma=1.0, lam=1.0)
    assert advantages.shape == returns.shape == (2, 0)


@given(seed=seeds, shape=shapes, gamma=unit)
def test_discounted_returns_equal_a_loop(seed: int, shape: tuple[int, int], gamma: float) -> None:
    rewards, mask = numbers(seed, *shape), random_mask(seed, *shape)
    terminated, truncated = flags(seed, *shape)
    got = F.discounted_returns(spoil(rewards, mask), terminated, truncated, gamma=gamma, mask=mask)
    for row in range(shape[0]):
        total = 0.0
        for step in reversed(range(shape[1])):
            if not mask[row, step]:
                assert got[row, step] == 0
                continue
            done = bool(terminated[row, step] or truncated[row, step])
            total = rewards[row, step].item() + (0.0 if done else gamma * total)
            assert got[row, step].item() == pytest.approx(total, abs=1e-9)


@given(seed=seeds, groups=st.integers(1, 4), size=st.integers(2, 5))
def test_group_advantages_equal_a_loop_over_siblings(seed: int, groups: int, size: int) -> None:
    scores = numbers(seed, groups * size)
    rloo = F.rloo_advantages(scores, size)
    centered = F.grpo_advantages(scores, size, normalize_std=False, eps=1e-4)
    scaled = F.grpo_advantages(scores, size, normalize_std=True, eps=1e-4)
    for index in range(groups * size):
        first = index // size * size
        group = scores[first : first + size].tolist()
        others = [score for place, score in enumerate(group) if first + place != index]
        score = scores[index].item()
        assert rloo[index].item() == pytest.approx(score - statistics.mean(others), abs=1e-9)
        assert centered[index].item() == pytest.approx(score - statistics.mean(group), abs=1e-9)
        expected = (score - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
        assert scaled[index].item() == pytest.approx(expected, abs=1e-9)


def test_a_group_of_equal_scores_has_exactly_zero_advantage() -> None:
    """0.1 is not a binary fraction: its mean over 7 is off by a bit, which eps = 0 would blow up."""
    scores = torch.full((7,), 0.1)
    assert F.grpo_advantages(scores, 7, normalize_std=True, eps=0.0).eq(0).all()
    assert math.isclose(F.rloo_advantages(scores, 7).abs().max().item(), 0.0, abs_tol=1e-7)


@pytest.mark.usefixtures("unchecked")
def test_wrong_groups_and_lengths_are_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match=r"at least 2, got 1.*num_return_sequences"):
        F.rloo_advantages(torch.zeros(4), 1)
    with pytest.raises(ValueError, match=r"whole groups of 3, got 4 scores"):
        F.grpo_advantages(torch.zeros(4), 3, normalize_std=True, eps=1e-4)
    never = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"one longer than rewards \(2, 3\), got \(2, 3\).*Append it"):
        F.gae(torch.zeros(2, 3), torch.zeros(2, 3), never, never, gamma=1.0, lam=1.0)


def test_the_length_adaptive_lambda_is_clamped_where_the_formula_would_be_negative() -> None:
    """α = 0.05: 1 - 1/(0.05 · 100) = 0.8; at 40 actions 0.5; at 10 the formula says -1."""
    lengths = (100, 40, 10, 1)
    mask = torch.tensor([[step < length for step in range(100)] for length in lengths])
    assert_close(F.length_adaptive_lam(mask, 0.05), torch.tensor([0.8, 0.5, 0.5, 0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"alpha=0\.0.*diverge"):
        F.length_adaptive_lam(mask, 0.0)
