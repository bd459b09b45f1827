import torch
from hypothesis import given
from torch.testing import assert_close

from rlhf_ppo import functional as F
from tests.functional.cases import numbers, random_mask, seeds, shapes, spoil


@given(seed=seeds, shape=shapes)
def test_the_bias_by_position_equals_a_loop_over_own_tokens(seed: int, shape: tuple[int, int]) -> None:
    values, returns, mask = numbers(seed, *shape), numbers(seed + 1, *shape), random_mask(seed, *shape)
    sums, counts = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for row, line in enumerate(mask):
        own = line.nonzero().flatten().tolist()
        for k, step in enumerate(own):
            sums[3 * k // len(own)] += values[row, step] - returns[row, step]
            counts[3 * k // len(own)] += 1
    found = F.value_bias_by_position(spoil(values, mask), spoil(returns, mask), mask, bins=3)
    assert_close(found[0], sums)
    assert_close(found[1], counts)
