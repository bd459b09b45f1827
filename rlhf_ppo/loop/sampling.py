"""Build the collector of the managed loop, and sync the policy's weights to the sampler before each rollout."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from rlhf_ppo.environments import EnvironmentFactory, EnvironmentSampler
from rlhf_ppo.functional.masked import HALF_PRECISION
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.loop.config import TrainConfig
from rlhf_ppo.loop.curriculum import CurriculumSampler
from rlhf_ppo.models.trunk import max_positions
from rlhf_ppo.rewards.gather import make_scoring
from rlhf_ppo.rollout.collect import Collector
from rlhf_ppo.rollout.episodes import NumberedEpisodes
from rlhf_ppo.rollout.prompts import PromptDataset, PromptSampler
from rlhf_ppo.samplers.base import Sampler, WeightSyncedSampler
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from rlhf_ppo.samplers.make_sampler import why_it_differs
from rlhf_ppo.samplers.stop_tokens import with_stop_tokens


def make_collector(
    learner: PPOLearner, config: TrainConfig, sampler: Sampler | None, environment: EnvironmentFactory | None = None
) -> Collector:
    """Build the `Collector`, which samples and scores responses for `learner`, or plays episodes.

    Args:
        sampler: None: `DecodeLoop`.
        environment: Makes the environment of an episode; None: responses of one turn.
    """
    sampler = sampler or DecodeLoop(learner.tokenizer, kv_budget_bytes=learner.config.kv_budget_bytes)
    episodes = environment and EnvironmentSampler(
        factory=environment, sampler=sampler, tokenizer=learner.tokenizer, device=learner.current_device,
        config=config.episodes, max_positions=max_positions(learner.model.pretrained_model),
        any_process=learner.processes.any_process, keep_timed_out=learner.algorithm.has_critic,
        may_rewrite=learner.algorithm.has_critic,
    )  # fmt: skip
    return Collector(
        model=learner.model, tokenizer=learner.tokenizer, sampling=config.sampling, device=learner.current_device,
        sampler=sampler, failures=config.reward_failures, synced_weights=partial(synced_weights, learner, sampler),
        overlong=config.overlong, mask_truncated=config.mask_truncated, best_of=config.best_of,
        environment=episodes or None, episode_seeds=(learner.config.seed, 0),
        limits=learner.limits, sources_context=learner.sources_context,
        scoring=make_scoring(learner.processes, on_main=config.reward_calls == "once"),
    )  # fmt: skip


def why_sampler_differs(learner: PPOLearner, sampler: Sampler) -> str | None:
    """Why the distribution of `sampler` is known to differ from the policy's; None: it does not."""
    return why_it_differs(sampler) or _low_precision(learner)


def make_prompt_sampler(
    learner: PPOLearner, config: TrainConfig, prompts: PromptDataset | NumberedEpisodes
) -> PromptSampler | CurriculumSampler:
    """Build the sampler of this process's batches of prompts, with the curriculum if there is one.

    It goes on where the last call of `train` stopped in the same prompts.
    """
    accelerator, seed = learner.accelerator, learner.config.seed
    batch_size = learner.config.batch_size // config.sampling.num_return_sequences
    sampler = PromptSampler(
        len(prompts), batch_size=batch_size, seed=seed, rank=accelerator.process_index,
        world_size=accelerator.num_processes, lengths=prompts.lengths, checksum=prompts.checksum,
    )  # fmt: skip
    earlier = learner.prompt_sampler
    earlier = earlier.sampler if isinstance(earlier, CurriculumSampler) else earlier
    if isinstance(earlier, PromptSampler):
        sampler.go_on_from(earlier)
    if config.curriculum is None:
        return sampler
    return CurriculumSampler(sampler, config.curriculum, batch_size, seed, learner.processes)


def with_model_stops(config: TrainConfig, learner: PPOLearner) -> TrainConfig:
    """`config` with the stop tokens of the learner's model and tokenizer, unless it names its own."""
    sampling = with_stop_tokens(config.sampling, learner.model.pretrained_model, learner.tokenizer)
    return replace(config, sampling=sampling)


@contextmanager
def synced_weights(learner: PPOLearner, sampler: Sampler) -> Iterator[None]:
    """Context manager: while active, `sampler` uses the current weights of the policy.

    A sampler with its own copy (vLLM) is sent the weights before every rollout and evaluation, whether or not they have
    changed. Other samplers use the live module, whose sharded parameters are gathered.
    """
    with learner.precision.sampling(learner.current_device):
        if isinstance(sampler, WeightSyncedSampler):
            sampler.sync_weights(learner.model, learner.accelerator)
            yield
        else:
            with learner.gathered_parameters():
                yield


def _low_precision(learner: PPOLearner) -> str | None:
    """Why a sampler rounds differently from the learner's pass over whole responses; None: in float32 it does not."""
    dtypes = {parameter.dtype for parameter in learner.model.parameters() if parameter.is_floating_point()}
    low = sorted({str(dtype) for dtype in dtypes | {learner.precision.compute} if dtype in HALF_PRECISION})
    return f"{low[0]} rounds differently token by token than in one pass" if low else None
