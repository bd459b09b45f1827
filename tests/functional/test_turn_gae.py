"""GAE over turns: the identities with GAE over tokens, and an example by hand."""

import torch
from torch.testing import assert_close

from rlhf_ppo.functional import gae, turn_gae

F64 = torch.float64


def test_where_every_turn_has_one_token_it_is_gae_over_tokens() -> None:
    """Gaps of observations included."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1, 1]]).bool()
    rewards = torch.randn(2, 8, dtype=F64, generator=generator)
    values = torch.randn(2, 9, dtype=F64, generator=generator)
    terminated, truncated = torch.zeros(2, 2, 8).bool()
    truncated[0, 6], terminated[1, 7] = True, True
    steps = rewards, values, terminated, truncated
    expected = gae(*steps, gamma=0.9, lam=0.7, mask=mask)
    for ours, theirs in zip(turn_gae(*steps, gamma=0.9, lam=0.7, mask=mask, turn_starts=mask), expected, strict=True):
        assert_close(ours, theirs)


def test_turns_of_several_tokens_are_steps_of_a_shorter_episode() -> None:
    """Two turns of 2 and 3 tokens around an observation are two steps: with the sum of their rewards, and V at their
    first tokens. Junk (nan) outside those places is not read."""
    nan = float("nan")
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]]).bool()
    starts = torch.tensor([[1, 0, 0, 1, 0, 0]]).bool()
    rewards = torch.tensor([[0.1, 0.2, nan, 0.0, 0.0, 1.0]], dtype=F64)
    values = torch.tensor([[0.5, nan, nan, 0.7, nan, nan, 0.4]], dtype=F64)
    for is_truncated in (False, True):
        last = torch.tensor([[0, 0, 0, 0, 0, 1]]).bool()
        terminated, truncated = last & (not is_truncated), last & is_truncated
        advantages, returns = turn_gae(
            rewards, values, terminated, truncated, gamma=0.9, lam=0.8, mask=mask, turn_starts=starts
        )
        second = 1.0 + (0.9 * 0.4 if is_truncated else 0.0) - 0.7
        first = 0.3 + 0.9 * 0.7 - 0.5 + 0.9 * 0.8 * second
        assert_close(advantages, torch.tensor([[first, first, 0, second, second, second]], dtype=F64))
        # The second token of the first turn no longer earns the 0.1 of the first.
        expected = [[first + 0.5, first + 0.4, 0, second + 0.7, second + 0.7, second + 0.7]]
        assert_close(returns, torch.tensor(expected, dtype=F64))


def test_two_turns_without_an_observation_between_them_are_still_two() -> None:
    mask = torch.ones(1, 4).bool()
    rewards, values = torch.tensor([[0.0, 1.0, 0.0, 1.0]], dtype=F64), torch.zeros(1, 5, dtype=F64)
    last = torch.tensor([[0, 0, 0, 1]]).bool()
    two = turn_gae(
        rewards, values, last, last & False, gamma=0.5, lam=1.0, mask=mask,
        turn_starts=torch.tensor([[1, 0, 1, 0]]).bool(),
    )  # fmt: skip
    assert_close(two[0], torch.tensor([[1.5, 1.5, 1.0, 1.0]], dtype=F64))


def test_starts_of_turns_outside_the_mask_are_not_read() -> None:
    """They would count as turns, and λ with them."""
    mask = torch.tensor([[1, 0, 1, 1, 0]]).bool()
    starts, last = torch.tensor([[1, 0, 1, 0, 0]]).bool(), torch.tensor([[0, 0, 0, 1, 0]]).bool()
    rewards, values = torch.ones(1, 5, dtype=F64), torch.ones(1, 6, dtype=F64)
    clean, spoiled = (
        turn_gae(rewards, values, last, last & False, gamma=1.0, lam=0.5, mask=mask, turn_starts=flags)
        for flags in (starts, starts | ~mask)
    )
    for one, other in zip(clean, spoiled, strict=True):
        assert_close(one, other)
