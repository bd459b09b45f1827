"""`PPOTrainer`, the main class: `generate`, `step`, `train`. One iteration is `PPOLearner.learn`."""

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from rlhf_ppo.algorithms import AlgorithmConfig
from rlhf_ppo.classic.composed_step import composed_step, overridden_methods
from rlhf_ppo.classic.running_moments import RunningMoments
from rlhf_ppo.classic.surface import ClassicSurface
from rlhf_ppo.diagnostics.doctor import diagnose, diagnose_first_batch
from rlhf_ppo.diagnostics.dump import dump_on_failure
from rlhf_ppo.diagnostics.findings import DoctorReport
from rlhf_ppo.diagnostics.text_checks import DiagnosedBatch
from rlhf_ppo.environments import EnvironmentFactory, Episode, EpisodeConfig
from rlhf_ppo.functional import total_scores
from rlhf_ppo.learner.arguments import check_arguments, check_optimizer, check_pretraining
from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.learner.statistics import Statistics
from rlhf_ppo.loop.config import check_groups
from rlhf_ppo.loop.evaluation import Evaluation
from rlhf_ppo.loop.training import Callback, TrainConfig, TrainingLoop, TrainState
from rlhf_ppo.models import PreTrainedModelWrapper
from rlhf_ppo.rewards.sources import RewardSources
from rlhf_ppo.rollout.episodes import check_step_arguments, prompt_set
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import Sampler, Samples, SamplingConfig
from rlhf_ppo.updates.pretraining import PretrainingMix
from rlhf_ppo.utils.classic_paths import CLASSIC_PATHS, lend_names


class PPOTrainer(ClassicSurface):
    """Fine-tunes a language model with a value head on scores, by PPO or a related algorithm.

    `step(queries, responses, scores)` serves a loop of your own; `train(...)` is the managed loop. Both run `learn`.

    Args:
        config: Settings; batch sizes are per process.
        model: The policy with its value head.
        ref_model: The frozen reference of the KL penalty. None: a frozen copy of `model`, or `model` itself with its
            adapters off (or switched to the adapter that training started from) when it carries LoRA adapters.
        tokenizer: Of `model`.
        dataset: Rows for `dataloader`, or the prompts of `train`; None: neither.
        optimizer: Over the trainable parameters of `model`; None: the one that `config.optimizer` names.
        data_collator: Collator of `dataloader`.
        num_shared_layers: Lower layers that policy and copied reference share in memory, frozen; only without adapters.
        lr_scheduler: Stepped once per `step()`.
        training_data_collator: Pads the rows that `step` scores; None: `step` scores response tokens without padding.
        algorithm: What is optimized; None: PPO with the clipped surrogate, from the classic fields of `config`.
        pretraining: Texts that every optimizer step also learns (PPO-ptx); None: none.

    Raises:
        ValueError: An argument is of the wrong type; nothing has been moved or changed then.
    """

    diagnosis: DoctorReport | None
    """The doctor's findings in the first batch; None before."""

    def __init__(
        self,
        config: PPOConfig,
        model: PreTrainedModelWrapper,
        ref_model: PreTrainedModelWrapper | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: torch.utils.data.Dataset[Any] | datasets.Dataset | PromptDataset | None = None,
        optimizer: Optimizer | None = None,
        data_collator: Callable[..., Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: LRScheduler | None = None,
        training_data_collator: Callable[..., Any] | None = None,
        *,
        algorithm: AlgorithmConfig | None = None,
        pretraining: PretrainingMix | None = None,
    ) -> None:
        check_arguments(config, model, ref_model, tokenizer, dataset, lr_scheduler)
        assert tokenizer is not None  # narrowed by the check above
        check_optimizer(model, optimizer)
        check_pretraining(model, pretraining)
        super().__init__(
            config, model, ref_model, tokenizer, optimizer, num_shared_layers, lr_scheduler, algorithm=algorithm,
            pretraining=pretraining,
        )  # fmt: skip
        self.update_context = partial(dump_on_failure, self)
        self.running = RunningMoments(self.accelerator)
        self.data_collator = training_data_collator or DataCollatorForLanguageModeling(tokenizer, mlm=False)
        self.dataset, self.dataloader = dataset, None
        if dataset is None or isinstance(dataset, PromptDataset):  # `train` may first restore which run to continue
            self.trackers.begin_when_used()
            if data_collator is not None:
                warnings.warn(
                    "data_collator is not used: it is that of `trainer.dataloader`, and there is none without a "
                    "`dataset` of rows. Pass `dataset`, or leave data_collator out.", UserWarning, stacklevel=2,
                )  # fmt: skip
        else:  # a loop of the user's own
            self.dataloader = self.prepare_dataloader(dataset, data_collator)
            self.trackers.begin()
        self.follow_assignments(default_optimizer=optimizer is None, default_algorithm=algorithm is None)

    def step(
        self,
        queries: list[Tensor] | list[Episode],
        responses: list[Tensor] | None = None,
        scores: list[Tensor] | None = None,
        response_masks: list[Tensor] | None = None,
        *,
        truncated: Sequence[bool] | Tensor | None = None,
        group_size: int = 1,
        any_batch_size: bool = False,
    ) -> Statistics:
        """Learn from responses that you sampled and scored: one PPO iteration.

        Args:
            queries: Prompt tokens, one Long [P_i] per sample; or finished `Episode`s, and nothing else.
            responses: Response tokens, stop token included, without the prompt, one Long [T_i] per sample.
            scores: One number per sample, credited to the last action, or one per response token, [T_i].
            response_masks: One 0/1 [T_i] per sample; 0 marks tokens that the policy did not choose (tool output).
            truncated: One flag per sample: True where a limit cut the episode off, so that the value of its last state
                stands for the rest. None: every episode ended by itself.
            group_size: Number of adjacent responses to one prompt, which RLOO and GRPO compare.
            any_batch_size: Accept another number of samples than `config.batch_size`.

        Returns:
            The classic's 40 statistics; `self.metrics` holds further ones.

        Raises:
            ValueError: The batch is malformed; nothing has changed then.
        """
        self.trackers.begin()
        if overridden_methods(self):
            if truncated is not None or group_size != 1 or any_batch_size or responses is None or scores is None:
                raise ValueError(
                    f"step() of a trainer that overrides {overridden_methods(self)} runs the classic's methods, which "
                    "know neither episodes, truncated, group_size nor any_batch_size: they would be ignored. Leave "
                    "them out, and pass queries, responses and scores."
                )
            statistics = composed_step(
                self, cast("list[Tensor]", queries), responses, scores, response_masks,
                before_update=self._before_update,
            )  # fmt: skip
            return self._as_logged(statistics)
        limits = replace(self.limits, batch_size=None) if any_batch_size else self.limits
        batch = self.processes.run_or_fail_together(
            lambda: check_step_arguments(
                queries, responses, scores, response_masks, limits=limits, device=self.current_device,
                truncated=truncated, group_size=group_size,
            )
        )  # fmt: skip
        self._before_update(batch)
        return self._as_logged(self.learn(batch))

    def _as_logged(self, statistics: Statistics) -> Statistics:
        """With Weights & Biases the classic's numbers were NumPy's, whose `.item()` its scripts call."""
        if self.config.log_with != "wandb":
            return statistics
        return {name: np.float64(value) if isinstance(value, float) else value for name, value in statistics.items()}

    def _before_update(self, batch: Responses) -> None:
        diagnose_first_batch(self, DiagnosedBatch.of_batch(batch))
        self._push_if_best(total_scores(batch.scores, batch.mask))

    def diagnose(self, batch: DiagnosedBatch | Samples) -> DoctorReport:
        """Check that the trainer scores what the sampler drew, and return findings with their remedies.

        Args:
            batch: Prompts and responses; further fields allow further checks.
        """
        return diagnose(self, DiagnosedBatch.of(batch))

    def train(
        self,
        rewards: RewardSources | None,
        config: TrainConfig,
        *,
        prompts: PromptDataset | int | None = None,
        eval_prompts: PromptDataset | int | None = None,
        judges: RewardSources | None = None,
        callbacks: Sequence[Callback] = (),
        sampler: Sampler | None = None,
        environment: EnvironmentFactory | None = None,
    ) -> TrainState:
        """Run the managed loop: prompts -> responses -> scores -> `learn`, for `config.iterations`.

        Another call on the same trainer trains on: it goes on in the order of the same prompts, and in the random
        numbers. A call that resumes continues those of its checkpoint.

        Args:
            rewards: One text callable, or several by name with weights; `(prompts=, responses=, **columns) -> scores`.
                With an environment they are added at the end of an episode; None: its rewards alone.
            config: Settings of the loop: iterations, sampling, evaluation, run folder.
            prompts: Training prompts, whose columns an environment's `reset` gets, or a number of episodes; None: the
                `PromptDataset` that the trainer was built with.
            eval_prompts: Held-out prompts, or a number of episodes, for the periodic evaluation.
            judges: Reward sources called in the evaluation only; the policy is not trained on them.
            callbacks: Called after every iteration with the trainer and the state; True stops.
            sampler: Samples the responses; None: `DecodeLoop`.
            environment: Class of an environment, or a function that makes one: called for each episode. None: one turn.
        """
        if overridden := overridden_methods(self):
            raise ValueError(
                f"expected a trainer without overridden inner methods in train(), got {', '.join(overridden)}: only "
                "step() calls them. Run your own loop with generate() and step(), or remove the override."
            )
        if self.config.push_to_hub_if_best_kwargs:
            raise ValueError(
                "expected no push_to_hub_if_best_kwargs in train(), which only step() reads: no model would ever be "
                "pushed. Set TrainConfig.keep_best, and push the folder best/ after the run."
            )
        if config.output_dir is None:
            config = replace(config, output_dir=self.config.output_dir)
        if prompts is None:
            if not isinstance(self.dataset, PromptDataset):
                raise ValueError("train() needs prompts: pass `prompts`, or build the trainer with a PromptDataset")
            prompts = self.dataset
        check_groups(self, config)
        sets = prompt_set(prompts), None if eval_prompts is None else prompt_set(eval_prompts)
        return TrainingLoop(self, sets[0], rewards, config, sets[1], judges, callbacks, sampler, environment).run()

    def evaluate(
        self,
        prompts: PromptDataset | int,
        rewards: RewardSources | None,
        sampling: SamplingConfig,
        *,
        judges: RewardSources | None = None,
        sampler: Sampler | None = None,
        seed: int = 0,
        reward_calls: Literal["each", "once"] = "each",
        environment: EnvironmentFactory | None = None,
        episodes: EpisodeConfig | None = None,
    ) -> Evaluation:
        """Sample responses to held-out prompts, or play episodes in an environment.

        Measures scores, judges, KL to the reference, perplexity under it, and the numbers of episodes. One response to
        each prompt, whatever `sampling.num_return_sequences`.
        """
        sampling = replace(sampling, num_return_sequences=1)
        config = TrainConfig(sampling=sampling, reward_calls=reward_calls, episodes=episodes or EpisodeConfig())
        held_out = prompt_set(prompts)
        loop = TrainingLoop(
            self, held_out, rewards, config, eval_prompts=held_out, judges=judges, sampler=sampler,
            environment=environment,
        )  # fmt: skip
        return loop.evaluate(seed=seed)


__path__: list[str] = []  # TRL's classic had modules below this one, such as rlhf_ppo.trainer.ppo_trainer
lend_names(sys.modules[__name__], "trainer", CLASSIC_PATHS["trainer"])
