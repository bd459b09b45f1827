"""Build the collector of the managed loop, and sync the policy's weights to the sampler before each rollout."""

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
    """Build the `Collector`, which samples and scores responses for `learner`; `sampler` None: `DecodeLoop`."""
    sampler = sampler or DecodeLoop(learner.tokenizer)
    return Collector(
        model=learner.model, tokenizer=learner.tokenizer, sampling=config.sampling, device=learner.current_device,
        sampler=sampler, failures=config.reward_failures, synced_weights=partial(synced_weights, learner, sampler),
        limits=learner.limits, scoring=make_scoring(learner.processes, on_main=config.reward_calls == "once"),
    )  # fmt: skip


@contextmanager
def synced_weights(learner: PPOLearner, sampler: Sampler) -> Iterator[None]:
    """Context manager: while active, `sampler` uses the current weights of the policy.

    A sampler with its own copy (vLLM) is sent the weights before every rollout and evaluation, whether or not they have
    changed. Other samplers use the live module, whose sharded parameters are gathered.
    """
    if isinstance(sampler, WeightSyncedSampler):
        sampler.sync_weights(learner.model, learner.accelerator)
        yield
    else:
        with learner.gathered_parameters():
            yield
