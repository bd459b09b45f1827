"""`PPOTrainer`: `generate`, `step`, `train`. One iteration reads like the paper's algorithm box, see `learn`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import datasets
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from rlhf_ppo.algorithms import AlgorithmConfig
from rlhf_ppo.classic.surface import ClassicSurface
from rlhf_ppo.diagnostics.doctor import diagnose, diagnose_first_batch
from rlhf_ppo.diagnostics.dump import dump_on_failure
from rlhf_ppo.diagnostics.findings import Diagnosis
from rlhf_ppo.diagnostics.text_checks import DiagnosedBatch
from rlhf_ppo.learner.arguments import check_arguments
from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.learner.statistics import Statistics
from rlhf_ppo.loop.evaluation import Evaluation
from rlhf_ppo.loop.training import Callback, TrainConfig, TrainingLoop, TrainState
from rlhf_ppo.models import PreTrainedModelWrapper
from rlhf_ppo.rewards.sources import RewardSources
from rlhf_ppo.rollout.checks import check_step_inputs
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import Sampler, Samples, SamplingConfig


class PPOTrainer(ClassicSurface):
    """Fine-tune a language model with a value head against scores, by PPO or its relatives.

    `step(queries, responses, scores)` serves a loop of your own; `train(...)` is the managed loop. Both run `learn`.

    Args:
        config: Settings; sizes are those of one process.
        model: The policy with its value head.
        ref_model: The frozen reference of the KL penalty. None: a frozen copy of `model`, or `model` itself with its
            adapters off (or switched to the adapter that training started from) when it carries LoRA adapters.
        tokenizer: Of `model`. Must have a padding token.
        dataset: Rows for `dataloader`, or the prompts of `train`; None when you bring your own.
        optimizer: Over the trainable parameters of `model`; None: Adam with `config.learning_rate`.
        data_collator: Of `dataloader`.
        num_shared_layers: Lower layers that policy and copied reference share in memory, frozen.
        lr_scheduler: Stepped once a `step()`.
        training_data_collator: Kept for the classic methods that pad a batch.
        algorithm: What is optimized; None: PPO with the clipped surrogate, from the classic fields of `config`.

    Raises:
        ValueError: For an argument of the wrong kind, before anything is moved or changed.
    """

    diagnosis: Diagnosis | None
    """What the doctor found in the first batch."""

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
    ) -> None:
        check_arguments(config, model, ref_model, tokenizer, dataset, lr_scheduler)
        assert tokenizer is not None  # narrowed by the check above
        super().__init__(
            config, model, ref_model, tokenizer, optimizer, num_shared_layers, lr_scheduler, algorithm=algorithm
        )
        self.update_context = partial(dump_on_failure, self)
        self.data_collator = training_data_collator or DataCollatorForLanguageModeling(tokenizer, mlm=False)
        self.dataset, self.dataloader = dataset, None
        if not isinstance(dataset, PromptDataset):  # a loop of the user's own
            self.dataloader = None if dataset is None else self.prepare_dataloader(dataset, data_collator)
            self.trackers.begin()

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> Statistics:
        """One optimization step on responses that you sampled and scored.

        Args:
            queries: One Long [P_i] a sample: prompt tokens.
            responses: One Long [T_i] a sample: response tokens, stop token included, without the prompt.
            scores: One number a sample, or one a response token [T_i]. A single number is earned by the last action.
            response_masks: One 0/1 [T_i] a sample; 0 marks tokens that the policy did not choose (tool output).

        Returns:
            The classic's 40 statistics; `self.metrics` holds further ones.

        Raises:
            ValueError: If anything is wrong with the batch; nothing has changed then.
        """
        limits, device = self.limits, self.current_device
        batch = self.processes.run_or_fail_together(
            lambda: check_step_inputs(queries, responses, scores, response_masks, limits=limits, device=device)
        )
        diagnose_first_batch(self, DiagnosedBatch.of_batch(batch))
        self._push_if_best(batch.scores)
        return self.learn(batch)

    def diagnose(self, batch: DiagnosedBatch | Samples) -> Diagnosis:
        """Does the trainer score what the sampler drew? Prompts and responses, and whatever else is known of them."""
        return diagnose(self, DiagnosedBatch.of(batch))

    def train(
        self,
        rewards: RewardSources,
        config: TrainConfig,
        *,
        prompts: PromptDataset | None = None,
        eval_prompts: PromptDataset | None = None,
        judges: RewardSources | None = None,
        callbacks: Sequence[Callback] = (),
        sampler: Sampler | None = None,
    ) -> TrainState:
        """The managed loop: prompts -> responses -> scores -> `learn`, until `config.iterations`.

        Args:
            rewards: One text callable, or several by name with weights; `(prompts=, responses=, **columns) -> scores`.
            config: How long, how often to evaluate and save, where to.
            prompts: What is answered; None: the `PromptDataset` that the trainer was built with.
            eval_prompts: Held-out prompts for the periodic evaluation.
            judges: Sources asked in the evaluation only: the policy is not rewarded by them.
            callbacks: Called after every iteration with the trainer and the state; True stops.
            sampler: Who draws responses; None: the own decode loop.
        """
        if prompts is None:
            if not isinstance(self.dataset, PromptDataset):
                raise ValueError("train() needs prompts: pass `prompts`, or build the trainer with a PromptDataset")
            prompts = self.dataset
        return TrainingLoop(self, prompts, rewards, config, eval_prompts, judges, callbacks, sampler).run()

    def evaluate(
        self,
        prompts: PromptDataset,
        rewards: RewardSources,
        sampling: SamplingConfig,
        *,
        judges: RewardSources | None = None,
        sampler: Sampler | None = None,
        seed: int = 0,
        reward_calls: Literal["each", "once"] = "each",
    ) -> Evaluation:
        """Answer held-out prompts, score and judge the answers, measure KL and perplexity under the reference."""
        config = TrainConfig(sampling=sampling, reward_calls=reward_calls)
        loop = TrainingLoop(self, prompts, rewards, config, eval_prompts=prompts, judges=judges, sampler=sampler)
        return loop.evaluate(seed=seed)
