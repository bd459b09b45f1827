"""`PPOTrainer`: `generate`, `step`, `train`. One iteration reads like the paper's algorithm box, see `learn`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from rlhf_ppo.algorithms import AlgorithmConfig, build_algorithm
from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.classic.helpers import set_seed
from rlhf_ppo.classic.surface import ClassicSurface
from rlhf_ppo.diagnostics.doctor import diagnose, first_look
from rlhf_ppo.diagnostics.dump import dumping
from rlhf_ppo.diagnostics.findings import Diagnosis
from rlhf_ppo.diagnostics.text_checks import Specimen
from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.learner.arguments import check_arguments, default_optimizer, fill_in, make_accelerator
from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.learner.finite_checks import check_scored, warn_of_negative_kl
from rlhf_ppo.learner.importance_correction import check_correctable, corrected, mismatch_metrics, own_ratios
from rlhf_ppo.learner.prepare import prepare
from rlhf_ppo.learner.running_moments import RunningMoments, normalised_scores
from rlhf_ppo.learner.start_kl import StartCheck
from rlhf_ppo.learner.statistics import Statistics, StepFacts, classic_statistics, extra_metrics, work_metrics
from rlhf_ppo.learner.trackers import Trackers
from rlhf_ppo.loop.evaluation import Evaluation
from rlhf_ppo.loop.training import Callback, TrainConfig, TrainingLoop, TrainState
from rlhf_ppo.models import PreTrainedModelWrapper, reference_adapter
from rlhf_ppo.models.reference import settle_reference
from rlhf_ppo.models.trunk import start_token_of
from rlhf_ppo.rewards.sources import Sources
from rlhf_ppo.rollout.checks import Limits, check_step_inputs
from rlhf_ppo.rollout.experience import Responses, Scored, Scorer, Shaping, shape_rollout
from rlhf_ppo.rollout.kl_placement import in_loss
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.rollout.sampler_reuse import SamplerReuse
from rlhf_ppo.samplers.base import Sampler, Samples, SamplingConfig
from rlhf_ppo.utils.timing import emptied_cache, timed


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
        algorithm: What is optimised; None: PPO with the clipped surrogate, from the classic fields of `config`.

    Raises:
        ValueError: For an argument of the wrong kind, before anything is moved or changed.
    """

    metrics: dict[str, float]
    """What the last step measured beyond the classic's 40 statistics."""
    newest: tuple[TrainBatch, Scored] | None
    """The last step's batch as its update saw it, with the KL terms, for the token view of the report."""
    diagnosis: Diagnosis | None
    """What the doctor found in the first batch."""
    dump_dir: Path | None
    """Where an update that gives up leaves its dump."""
    reference_at_hand: Callable[[], AbstractContextManager[object]]
    """Inside, the reference is there to be asked: brought to its device, or the model with its adapters off."""

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
        set_seed(config.seed)
        self.config = config
        self.tokenizer = tokenizer
        self.accelerator = make_accelerator(config)
        self.is_distributed, self.current_device = self.accelerator.num_processes > 1, self.accelerator.device
        self.is_encoder_decoder = bool(getattr(model, "is_encoder_decoder", False))
        self.is_peft_model = bool(model.is_peft_model)
        fill_in(config, self.accelerator.num_processes, self.is_encoder_decoder, self.is_peft_model)
        ref_model = settle_reference(model, ref_model, num_shared_layers)
        self.model, self.ref_model = model, ref_model
        self.data_collator = training_data_collator or DataCollatorForLanguageModeling(tokenizer, mlm=False)
        self.dataset = dataset
        own_loop = dataset is not None and not isinstance(dataset, PromptDataset)
        self.dataloader = self.prepare_dataloader(dataset, data_collator) if own_loop else None
        self.kl_ctl = config.kl_controller()
        self.running = RunningMoments()
        self.reuse = SamplerReuse(config.reuse_logprobs, lambda tensor: self.processes.reduce_max(tensor))
        self.optimizer: Optimizer = optimizer or default_optimizer(model, config)
        self.processes = Processes(self.accelerator)
        prepared = prepare(self.accelerator, config, model, ref_model, self.optimizer, lr_scheduler)
        self.policy, self.optimizer, self.lr_scheduler = prepared.policy, prepared.optimizer, prepared.lr_scheduler
        found = prepared.reference
        self._reference = None if found is None else found.module
        self._reference_is_whole = found is not None and not found.in_parts
        self.reference_at_hand = partial(reference_adapter, model) if found is None else found.at_hand
        self.start = StartCheck(model, self.processes, own_reference=found is None)
        self.algorithm_config = algorithm or config.algorithm()
        self.algorithm = build_algorithm(
            self.algorithm_config, policy=self.policy, optimizer=self.optimizer,
            accelerator=self.accelerator, minibatch=config.minibatch, seed=config.seed, reference=self._reference,
            reference_kl=in_loss(config.kl_penalty, config.kl_placement),
        )  # fmt: skip
        self.metrics, self.newest, self.diagnosis, self.current_step = {}, None, None, 0
        self.dump_dir = None if config.dump_dir is None else Path(config.dump_dir)
        self.trackers = Trackers(self.accelerator, config, at_once=not isinstance(dataset, PromptDataset))

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> Statistics:
        """One optimisation step on responses that you sampled and scored.

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
        batch = self.processes.together(
            lambda: check_step_inputs(queries, responses, scores, response_masks, limits=limits, device=device)
        )
        self.look_once(Specimen.of_batch(batch))
        self._push_if_best(batch.scores)
        return self.learn(batch)

    def learn(self, responses: Responses) -> Statistics:
        """One iteration on checked responses: score, shape, credit, update (Schulman et al. 2017, Algorithm 1)."""
        timing: dict[str, float] = {}
        cap = self.config.importance_sampling_cap
        check_correctable(responses, cap)
        work = self.accelerator.unwrap_model(self.policy).work
        work.clear()  # an evaluation may have counted in between
        with timed(timing, "total"), emptied_cache(self.config.optimize_device_cache):
            with timed(timing, "forward_pass"):
                scored: Scored = self.reuse(self.scorer, responses)  # log π_old, V, log π_ref
            check_scored(scored, responses.mask, self.processes, self.model)  # nothing has changed so far
            self.start(scored, responses.mask)
            scores = normalised_scores(
                responses.scores, self.running, scale=self.config.use_score_scaling, shift=self.config.use_score_norm,
                clip=self.config.score_clip, reduce_sum=self.processes.reduce_sum,
            )  # fmt: skip
            with timed(timing, "compute_rewards"):
                rollout, penalty = shape_rollout(replace(responses, scores=scores), scored, self._shaping())
            with timed(timing, "compute_advantages"):
                batch = self.algorithm.estimate_advantages(rollout)  # Â_t and value targets R_t
                batch = corrected(batch, responses, cap)  # where another engine drew
            with timed(timing, "optimize_step"), dumping(self):
                record = self.algorithm.update(batch)  # K epochs on the surrogate; π_old ← π_θ
            self.newest = batch, scored
            with timed(timing, "calc_stats"):
                first, *others = self.processes.gather_objects([StepFacts.of(responses, scores, scored, penalty).cpu()])
                facts: StepFacts = first.joined(others)  # rows of all processes: what follows is the same on each
                rate = float(self.optimizer.param_groups[0]["lr"])
                statistics = classic_statistics(facts, record, kl_coef=float(self.kl_ctl.value), learning_rate=rate)
                gathered = self.processes.gather_objects([(dict(work), own_ratios(batch, responses))])
                self.metrics = extra_metrics(facts, record) | work_metrics([counts for counts, _ in gathered])
                self.metrics |= mismatch_metrics([ratios for _, ratios in gathered], cap) | self.reuse.metrics()
            kl = float(statistics["objective/kl"])
            warn_of_negative_kl(kl, self.config.kl_penalty)
            self.kl_ctl.update(kl, len(facts.scores))
            if self.lr_scheduler is not None:
                # Accelerate's wrapper would step once a process.
                getattr(self.lr_scheduler, "scheduler", self.lr_scheduler).step()
        return statistics | {f"time/ppo/{name}": seconds for name, seconds in timing.items()}

    def diagnose(self, batch: Specimen | Samples) -> Diagnosis:
        """Does the trainer score what the sampler drew? Prompts and responses, and whatever else is known of them."""
        return diagnose(self, Specimen.of(batch))

    def look_once(self, batch: Specimen) -> None:
        """`diagnose` the first batch of this trainer, and warn of what spoils the run (`PPOConfig.diagnose`)."""
        self.diagnosis = first_look(self, batch) or self.diagnosis

    def train(
        self,
        rewards: Sources,
        config: TrainConfig,
        *,
        prompts: PromptDataset | None = None,
        eval_prompts: PromptDataset | None = None,
        judges: Sources | None = None,
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
        rewards: Sources,
        sampling: SamplingConfig,
        *,
        judges: Sources | None = None,
        sampler: Sampler | None = None,
        seed: int = 0,
        reward_calls: Literal["each", "once"] = "each",
    ) -> Evaluation:
        """Answer held-out prompts, score and judge the answers, measure KL and perplexity under the reference."""
        config = TrainConfig(sampling=sampling, reward_calls=reward_calls)
        loop = TrainingLoop(self, prompts, rewards, config, eval_prompts=prompts, judges=judges, sampler=sampler)
        return loop.evaluate(seed=seed)

    @contextmanager
    def whole_parameters(self, *, of_the_reference: bool = False) -> Iterator[None]:
        """Inside, `model` (or the reference) is whole on every process; all processes enter it together."""
        if of_the_reference and self._reference_is_whole:
            yield
            return
        pair = (self.ref_model, self._reference) if of_the_reference else (None, None)
        with self.processes.whole_parameters(pair[0] or self.model, pair[1] or self.policy):
            yield

    def whole_state(self) -> AbstractContextManager[dict[str, Tensor]]:
        """`model.state_dict()` with whole tensors on the main process, {} on the others; all enter it together."""
        return self.processes.whole_state(self.model, self.policy)

    @property
    def limits(self) -> Limits:
        """What `step()` refuses to exceed."""
        model_config = self.model.pretrained_model.config
        return Limits(
            batch_size=self.config.batch_size,
            needs_groups=self.algorithm.needs_groups,
            vocab_size=getattr(model_config, "vocab_size", None),
            max_positions=getattr(model_config, "max_position_embeddings", None),
            start_token_id=start_token_of(self.model.pretrained_model) if self.is_encoder_decoder else None,
        )

    @property
    def scorer(self) -> Scorer:
        """Policy and reference side by side, with the settings of this moment."""
        return Scorer(
            policy=self.policy, reference=self._reference, kl_penalty=self.config.kl_penalty,
            reference_context=self.reference_at_hand, rows=self.config.mini_batch_size,
            token_budget=self.config.token_budget, most=self.processes.most_passes,
        )  # fmt: skip

    def _shaping(self) -> Shaping:
        return Shaping(
            kl_coef=float(self.kl_ctl.value), kl_placement=self.config.kl_placement,
            whiten_rewards=self.config.whiten_rewards, gamma=self.config.gamma, lam=self.config.lam,
            separate_prompts=self.is_encoder_decoder, reduce_sum=self.processes.reduce_sum,
            reduce_max=self.processes.reduce_max,
        )  # fmt: skip
