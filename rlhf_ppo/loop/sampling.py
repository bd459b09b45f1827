"""What stands between an update and the next draw: the sampler must see the weights as they are now."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.loop.config import TrainConfig
from rlhf_ppo.rewards.gather import make_scoring
from rlhf_ppo.rollout.collect import Collector
from rlhf_ppo.samplers.base import Sampler, WeightSyncedSampler
from rlhf_ppo.samplers.decode_loop import DecodeLoop


def make_collector(learner: PPOLearner, config: TrainConfig, sampler: Sampler | None) -> Collector:
    """Draws and scores for `trainer`, by `sampler`, or by the own loop where there is none."""
    sampler = sampler or DecodeLoop(learner.tokenizer)
    return Collector(
        model=learner.model, tokenizer=learner.tokenizer, sampling=config.sampling, device=learner.current_device,
        sampler=sampler, failures=config.reward_failures, synced_weights=partial(synced_weights, learner, sampler),
        limits=learner.limits, scoring=make_scoring(learner.processes, on_main=config.reward_calls == "once"),
    )  # fmt: skip


@contextmanager
def synced_weights(learner: PPOLearner, sampler: Sampler) -> Iterator[None]:
    """Inside, `sampler` draws from the policy as it is: the live module made whole, or an engine's copy sent anew.

    An engine is sent the weights before every rollout and every evaluation, whatever happened in between (an update, a
    checkpoint loaded, a callback): a copy that is never assumed to be fresh cannot be stale.
    """
    if isinstance(sampler, WeightSyncedSampler):
        sampler.sync_weights(learner.model, learner.accelerator)
        yield
    else:
        with learner.gathered_parameters():
            yield
