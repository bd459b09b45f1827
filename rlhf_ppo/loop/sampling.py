"""What stands between an update and the next draw: the sampler must see the weights as they are now."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from rlhf_ppo.loop.config import TrainConfig
from rlhf_ppo.rewards.gather import scoring_of
from rlhf_ppo.rollout.collect import Collector
from rlhf_ppo.samplers.base import Sampler, WeightFollower
from rlhf_ppo.samplers.decode_loop import DecodeLoop

if TYPE_CHECKING:
    import rlhf_ppo.trainer


def collector_for(trainer: "rlhf_ppo.trainer.PPOTrainer", config: TrainConfig, sampler: Sampler | None) -> Collector:
    """Draws and scores for `trainer`, by `sampler`, or by the own loop where there is none."""
    sampler = sampler or DecodeLoop(trainer.tokenizer)
    return Collector(
        model=trainer.model, tokenizer=trainer.tokenizer, sampling=config.sampling, device=trainer.current_device,
        sampler=sampler, failures=config.reward_failures, fresh_weights=partial(fresh_weights, trainer, sampler),
        limits=trainer.limits, scoring=scoring_of(trainer.processes, once=config.reward_calls == "once"),
    )  # fmt: skip


@contextmanager
def fresh_weights(trainer: "rlhf_ppo.trainer.PPOTrainer", sampler: Sampler) -> Iterator[None]:
    """Inside, `sampler` draws from the policy as it is: the live module made whole, or an engine's copy sent anew.

    An engine is sent the weights before every rollout and every evaluation, whatever happened in between (an update, a
    checkpoint loaded, a callback): a copy that is never assumed to be fresh cannot be stale.
    """
    if isinstance(sampler, WeightFollower):
        sampler.follow(trainer.model, trainer.accelerator)
        yield
    else:
        with trainer.whole_parameters():
            yield
