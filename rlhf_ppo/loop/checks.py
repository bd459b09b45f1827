"""Checks of the managed loop: arguments before the first rollout, and rollouts without a usable sample."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.environments import EnvironmentFactory, EpisodeConfig
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.loop.config import TrainConfig
from rlhf_ppo.loop.evaluation import REFERENCE_MEASURES, judge_names
from rlhf_ppo.rewards.failures import RewardFailures
from rlhf_ppo.rewards.sources import RewardSourceError, RewardSources, named_sources
from rlhf_ppo.rollout.episodes import NumberedEpisodes
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.decode_support import check_positions

MAX_LOST_IN_A_ROW = 3
"""Successive rollouts without a usable score after which the run ends."""


def check_inputs(
    learner: PPOLearner,
    config: TrainConfig,
    *,
    prompts: PromptDataset | NumberedEpisodes,
    eval_prompts: PromptDataset | NumberedEpisodes | None,
    rewards: RewardSources | None,
    judges: RewardSources | None,
    environment: EnvironmentFactory | None,
) -> None:
    """Refuse arguments of `train` that would fail in the middle of a run or be ignored (ValueError, TypeError)."""
    check_environment(learner, config, environment, [prompts, eval_prompts], rewards)
    if rewards is not None:
        named_sources(rewards)
    check_evaluation(learner, config, eval_prompts, judges, environment)
    vocab_size = learner.limits.vocab_size
    if vocab_size is not None and any(token >= vocab_size for token in config.sampling.stops):
        raise ValueError(
            f"expected stop_token_ids below the model's vocabulary of {vocab_size}, got "
            f"{config.sampling.stops}: no response would ever stop. Take them from the model's own tokenizer."
        )
    if config.missing_eos is not None and not (config.sampling.stops or config.sampling.stop_strings):
        raise ValueError(
            f"expected a stop token or string for missing_eos={config.missing_eos}, got none: no response could ever "
            "end, and each would get the penalty. Leave `stop_token_ids` at None for the model's own, or drop "
            "missing_eos."
        )
    if not learner.is_encoder_decoder and environment is None:
        sets = [prompts] if eval_prompts is None else [prompts, eval_prompts]
        longest = max(dataset.longest for dataset in sets)
        check_positions(learner.model.pretrained_model, longest + config.sampling.max_new_tokens)


def check_evaluation(
    learner: PPOLearner,
    config: TrainConfig,
    eval_prompts: PromptDataset | NumberedEpisodes | None,
    judges: RewardSources | None,
    environment: EnvironmentFactory | None,
) -> None:
    """Refuse arguments that would be ignored, or fail at the first held-out evaluation (ValueError, TypeError)."""
    names, processes = judge_names(judges), learner.accelerator.num_processes
    if taken := [name for name in names if name in ("score", *REFERENCE_MEASURES)]:
        raise ValueError(
            f"expected judges with names of their own, got {taken[0]!r}: the evaluation has a measure of this name, "
            "and one would replace the other. Pass judges={'another name': judge}."
        )
    if config.eval_every and eval_prompts is None:
        raise ValueError(
            f"expected held-out prompts for eval_every={config.eval_every}, got none: no evaluation would ever be "
            "made. Pass `eval_prompts=` to train(), or set eval_every=0."
        )
    if config.guards.judge.limit is not None and (judges is None or not config.eval_every):
        raise ValueError(
            f"expected judges and evaluations for guards.judge, got judges={judges!r:.40} and "
            f"eval_every={config.eval_every}: the score could run away unseen. Pass `judges=` to train() and set "
            "eval_every, or leave guards.judge without a limit."
        )
    if config.guards.judge_name not in (None, *names):
        raise ValueError(
            f"Guards.judge_name is {config.guards.judge_name!r}, the judges are {names}: there is nothing to compare "
            "the score with. Name one of them, or pass it in `judges`."
        )
    measures = ["score", *names, *(REFERENCE_MEASURES if learner.has_reference else ["length"])]
    if environment is None and config.keep_best not in (None, *measures):  # an environment has numbers of its own
        raise ValueError(
            f"keep_best is {config.keep_best!r}, the evaluation has {measures}: no model could be compared. Name one "
            "of them."
        )
    if eval_prompts is not None and len(eval_prompts) < processes:
        raise ValueError(
            f"{processes} processes share {len(eval_prompts)} held-out prompts: each needs one at least. Give more "
            "prompts, or evaluate on fewer processes."
        )


def check_environment(
    learner: PPOLearner,
    config: TrainConfig,
    environment: EnvironmentFactory | None,
    prompts: Sequence[PromptDataset | NumberedEpisodes | None],
    rewards: RewardSources | None,
) -> None:
    """Refuse arguments about environments that do not agree (ValueError, TypeError)."""
    if environment is None:
        if rewards is None:
            raise ValueError(
                "expected reward sources, got rewards=None without an environment: nothing would be learned. Pass a "
                "callable (prompts=, responses=, **columns) -> list of scores, or `environment=`."
            )
        if any(isinstance(part, NumberedEpisodes) for part in prompts) or config.episodes != EpisodeConfig():
            raise ValueError(
                "expected an environment for a number of episodes, or for TrainConfig.episodes, got none: they would "
                "mean nothing. Pass `environment=`, or a PromptDataset and no episodes."
            )
        return
    if rewards is None and config.offload_rewards:
        raise ValueError(
            "expected reward sources whose models offload_rewards moves, got rewards=None: there is nothing to move. "
            "Set offload_rewards=False."
        )
    if not callable(environment) or (hasattr(environment, "step") and not isinstance(environment, type)):
        raise TypeError(
            f"environment must be a class, or a function that makes one environment for each episode, got "
            f"{environment!r:.80}: episodes at the same time would share their state. Pass the class itself."
        )
    _check_not_cut(prompts)
    unsupported = {
        "missing_eos": config.missing_eos is not None, "overlong": config.overlong is not None,
        "curriculum": config.curriculum is not None,
        "an encoder-decoder": learner.is_encoder_decoder,
    }  # fmt: skip
    if what := next((name for name, is_used in unsupported.items() if is_used), None):
        raise ValueError(
            f"expected a causal model without missing_eos for an environment, got {what}: a reply is not the end of an "
            "episode. Let the environment's rewards say what a long reply, or one without an end, costs; use a causal "
            "model."
        )


def _check_not_cut(prompts: Sequence[PromptDataset | NumberedEpisodes | None]) -> None:
    """Refuse prompts that were cut: environments read them whole."""
    for dataset in prompts:
        if isinstance(dataset, PromptDataset) and dataset.report.truncated:
            raise ValueError(
                f"expected whole prompts for an environment, got {dataset.report.describe()}: environments read the "
                "columns, so prompts would be longer than max_prompt_tokens. Use truncation='drop', or raise the limit."
            )


@dataclass
class LostRollouts:
    """Counts rollouts without a usable sample, because a reward source failed on all of them."""

    processes: Processes
    failures: RewardFailures
    total: int = 0
    """Lost rollouts of the run."""
    in_a_row: int = 0
    """Lost rollouts since the last usable one."""

    def is_lost(self, usable: int) -> bool:
        """Whether no process has a usable sample; if so, count and warn. Collective: the same result on all processes.

        Args:
            usable: Number of usable samples of this process.

        Raises:
            ValueError: The rollout is lost, and `RewardFailures.on_failure` is "raise".
            RewardSourceError: Too many rollouts in a row were lost.
        """
        count = torch.tensor(float(usable), device=self.processes.accelerator.device)
        if float(self.processes.reduce_sum(count)) > 0:
            self.in_a_row = 0
            return False
        if self.failures.on_failure == "raise":
            raise ValueError(
                "every sample of the batch was skipped by a reward source, or its environment failed: there is nothing "
                "to learn from. Let them return numbers (a warning names the environment's error), or set "
                "`TrainConfig.reward_failures` to on_failure='drop' to sample another batch."
            )
        self.total += 1
        self.in_a_row += 1
        if self.in_a_row >= MAX_LOST_IN_A_ROW:
            self.in_a_row = 0  # in the checkpoint, too: the run that continues from it counts anew
            raise RewardSourceError(
                f"expected a score for some sample, got none in {MAX_LOST_IN_A_ROW} rollouts in a row: nothing was "
                "learned from them and nothing has changed. Check what the reward sources return, and start again: the "
                "run continues from its checkpoint, if it has an output_dir."
            )
        warnings.warn("A rollout was lost: reward sources failed on every sample. Sampling another.", stacklevel=3)
        return True

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        total, in_a_row = int(state["total"]), int(state["in_a_row"])
        self.total, self.in_a_row = total, in_a_row
