"""Prompts by success rate: who is drawn, how rates move, and that a resumed run draws the same."""

from itertools import chain
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from rlhf_ppo import Curriculum, TrainConfig
from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.loop.curriculum import CurriculumSampler
from rlhf_ppo.rewards.sources import RewardScores
from rlhf_ppo.rollout.prompts import PromptSampler
from tests.support.tiny_run import SAMPLING, trainer


def sampler(config: Curriculum, *, length: int = 8, batch_size: int = 4) -> CurriculumSampler:
    processes = Processes(Accelerator(cpu=True))
    return CurriculumSampler(PromptSampler(length, batch_size=batch_size, seed=3), config, batch_size, 3, processes)


def scored(totals: list[float], skipped: tuple[int, ...] = ()) -> RewardScores:
    total, none = torch.tensor(totals), torch.zeros(len(totals), dtype=torch.bool)
    is_skipped = torch.tensor([row in skipped for row in range(len(totals))])
    return RewardScores(total=total, per_token=None, per_source={}, skipped=is_skipped, dropped=none)


def test_rates_are_shares_of_successes_and_move_by_half() -> None:
    """Two responses to each of four prompts, the last of them skipped: 1, 1/2, 0; then 0 again for the first."""
    own = sampler(Curriculum())
    first = next(own)
    own.update(scored([1.0, 2.0, 1.0, 0.0, -1.0, 0.0, 5.0, 5.0], skipped=(7,)))
    assert [own.rates.get(index) for index in first] == [1.0, 0.5, 0.0, None]
    own._last = first
    own.update(scored([0.0, 0.0] * 4))
    assert [own.rates[index] for index in first] == [0.5, 0.25, 0.0, 0.0]


def test_prompts_outside_the_band_give_way_to_others() -> None:
    own = sampler(Curriculum(keep=0.0))
    own.rates = {index: (0.0, 1.0, 0.5, 0.5)[index % 4] for index in range(8)}
    drawn = set(chain.from_iterable(next(own) for _ in range(10)))
    assert drawn == {2, 3, 6, 7}


def test_a_batch_is_full_even_where_no_prompt_is_in_the_band() -> None:
    own = sampler(Curriculum(keep=0.0))
    own.rates = dict.fromkeys(range(8), 0.0)
    assert [len(next(own)) for _ in range(3)] == [4, 4, 4]


@pytest.mark.parametrize("change", [{"low": 0.4}, {"high": 0.6}, {"keep": 1.0}], ids=["low", "high", "keep"])
def test_every_setting_changes_who_is_drawn(change: dict[str, float]) -> None:
    drawn = []
    for config in (Curriculum(keep=0.0), Curriculum(**{"keep": 0.0} | change)):
        own = sampler(config)
        own.rates = {0: 0.0, 1: 0.0, 2: 0.3, 3: 0.3, 4: 0.7, 5: 0.7, 6: 0.5, 7: 1.0}
        drawn.append([next(own) for _ in range(4)])
    assert drawn[0] != drawn[1]


def test_the_threshold_decides_what_a_success_is() -> None:
    own = sampler(Curriculum(threshold=1.5))
    first = next(own)
    own.update(scored([1.0, 2.0, 3.0, 1.5]))
    assert [own.rates[index] for index in first] == [0.0, 1.0, 1.0, 0.0]


def test_a_resumed_run_draws_the_same_prompts() -> None:
    own, again = sampler(Curriculum(keep=0.3)), sampler(Curriculum(keep=0.3))
    for _ in range(3):
        next(own)
        own.update(scored([0.0, 1.0, 0.0, 1.0]))
    again.load_state_dict(own.state_dict())
    assert [next(again) for _ in range(5)] == [next(own) for _ in range(5)]


def test_a_run_with_a_curriculum_measures_its_prompts() -> None:
    own = trainer()
    seen: list[str] = []

    def reward(*, prompts: list[str], responses: list[str], **_: Any) -> list[float]:
        seen.extend(prompts)
        return [float(text.startswith("The")) for text in prompts]

    config = TrainConfig(iterations=3, sampling=SAMPLING, progress=False, curriculum=Curriculum(keep=0.0))
    own.train(reward, config)
    assert len(seen) == 24


def test_a_band_without_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="no prompt would be within the band"):
        Curriculum(low=0.9, high=0.1)
