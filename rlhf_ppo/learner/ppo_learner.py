"""`PPOLearner`, which learns from checked responses. `learn` is the paper's algorithm box."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.algorithms import AlgorithmConfig, build_algorithm
from rlhf_ppo.algorithms.config import critic_settings
from rlhf_ppo.batch import TrainBatch
from rlhf_ppo.distributed.collectives import Processes
from rlhf_ppo.functional import value_bias_by_position
from rlhf_ppo.learner.arguments import check_shared_layers, fill_runtime_fields, make_accelerator
from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.learner.finite_checks import check_finite_scores, check_learnable, warn_of_negative_kl
from rlhf_ppo.learner.importance_correction import (
    ImportanceCorrection,
    check_ratio,
    check_sampler_logprobs,
    correct_for_sampler,
    local_mismatch,
    log_chosen_correction,
    mismatch_metrics,
    resolve_correction,
)
from rlhf_ppo.learner.memory_fit import fitted_token_budget
from rlhf_ppo.learner.model_card import write_model_card
from rlhf_ppo.learner.optimizer import make_optimizer
from rlhf_ppo.learner.prepare import prepare_models
from rlhf_ppo.learner.running_moments import RunningMoments, normalize_scores
from rlhf_ppo.learner.start_kl import StartKLCheck
from rlhf_ppo.learner.statistics import (
    BIAS_BINS,
    Statistics,
    StepData,
    bias_metrics,
    classic_statistics,
    extra_metrics,
    work_metrics,
)
from rlhf_ppo.learner.trackers import Trackers
from rlhf_ppo.models import PreTrainedModelWrapper, reference_adapter
from rlhf_ppo.models.critic import save_critic
from rlhf_ppo.models.reference import resolve_reference
from rlhf_ppo.models.trunk import decoder_start_token, learned_positions
from rlhf_ppo.rollout.checks import ModelLimits
from rlhf_ppo.rollout.experience import Responses, RewardShaping, ScoredResponses, Scorer, shape_rollout
from rlhf_ppo.rollout.kl_placement import loss_kl_estimator
from rlhf_ppo.rollout.sampler_reuse import SamplerReuse
from rlhf_ppo.updates import MinibatchConfig, TrustRegionConfig, UpdateRecord
from rlhf_ppo.updates.optimizers import learning_rate
from rlhf_ppo.updates.pretraining import PretrainingMix
from rlhf_ppo.utils.seeding import set_seed
from rlhf_ppo.utils.timing import empty_cache_after, timed


class PPOLearner:
    """Policy, reference, optimizer and algorithm: `learn` takes checked responses and updates the policy.

    The arguments are those of `PPOTrainer`, with the tokenizer required.
    """

    metrics: dict[str, float]
    """Metrics of the last step besides the classic's 40 statistics."""
    last_batch: tuple[TrainBatch, ScoredResponses] | None
    """Batch of the last update, and its scores under policy and reference; None before the first."""
    diagnosis: Any
    """The doctor's findings in the first batch (a `diagnostics.findings.DoctorReport`); None before."""
    dump_dir: Path | None
    """Folder for the dump of an update that fails on numbers that are not finite; None: no dump."""
    rollout_generator: torch.Generator
    """Draws the responses of this process, in one call of `train` after the other."""
    prompt_sampler: Iterator[list[int]] | None
    """Gave the prompts in the last call of `train`; None before."""
    reference_context: Callable[[], AbstractContextManager[object]]
    """Context manager: while active, the reference is on its device, or `model` has its adapters off."""
    sources_context: Callable[[], AbstractContextManager[object]] = nullcontext
    """Context manager: while active, the models of reward sources that `train` offloads are on their devices."""
    update_context: Callable[[], AbstractContextManager[object]]
    """Context manager around every update; the trainer's writes a dump if an update fails."""

    def __init__(
        self,
        config: PPOConfig,
        model: PreTrainedModelWrapper,
        ref_model: PreTrainedModelWrapper | None,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: Optimizer | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: LRScheduler | None = None,
        *,
        algorithm: AlgorithmConfig | None = None,
        pretraining: PretrainingMix | None = None,
    ) -> None:
        if ref_model is None:
            check_shared_layers(config, model, num_shared_layers)
        set_seed(config.seed)
        self._differing_sampler: str | None = None
        self._fitted_budget: int | None = None
        self.config, self.pretraining, self.tokenizer = config, pretraining, tokenizer
        self.algorithm_config = algorithm or config.algorithm()
        check_ratio(config.importance_sampling, self.algorithm_config)
        float32_only = isinstance(self.algorithm_config, TrustRegionConfig)
        self.accelerator, self.precision = make_accelerator(config, float32_only=float32_only)
        self.is_distributed, self.current_device = self.accelerator.num_processes > 1, self.accelerator.device
        self.is_encoder_decoder = bool(getattr(model, "is_encoder_decoder", False))
        self.is_peft_model = bool(model.is_peft_model)
        fill_runtime_fields(config, self.accelerator.num_processes, self.is_encoder_decoder, self.is_peft_model)
        self.has_reference = config.kl_penalty != "none"
        self.model = model
        self.ref_model = resolve_reference(model, ref_model, num_shared_layers) if self.has_reference else None
        self.kl_ctl, self.running = config.kl_controller(), RunningMoments()
        self.processes = Processes(self.accelerator)
        self.reuse = SamplerReuse(config.reuse_logprobs, self.processes.reduce_max)
        self.optimizer = make_optimizer(model, config, optimizer, critic_settings(self.algorithm_config))
        self._prepare(self.ref_model, self.optimizer, lr_scheduler)
        self.metrics, self.last_batch, self.diagnosis, self.current_step = {}, None, None, 0
        self.dump_dir = None if config.dump_dir is None else Path(config.dump_dir)
        self.update_context = nullcontext
        self.trackers, self.prompt_sampler = Trackers(self.accelerator, config), None
        self.rollout_generator = torch.Generator().manual_seed(config.seed + 100003 * self.accelerator.process_index)

    def _prepare(
        self, reference: PreTrainedModelWrapper | None, optimizer: Optimizer, lr_scheduler: LRScheduler | None
    ) -> None:
        """Move the models to their device, wrap them for the processes, and build the algorithm on them."""
        prepared = prepare_models(
            self.accelerator, self.config, self.model, reference, optimizer, lr_scheduler, precision=self.precision
        )
        self.policy, self.optimizer, self.lr_scheduler = prepared.policy, prepared.optimizer, prepared.lr_scheduler
        found = prepared.reference
        self._reference = None if found is None else found.module
        self._reference_is_whole = found is not None and not found.sharded
        self.reference_context = partial(reference_adapter, self.model) if found is None else found.context
        own = self.has_reference and found is None
        self.start_kl_check = StartKLCheck(self.model, self.processes, is_own_reference=own)
        self.build_algorithm()

    def build_algorithm(self) -> None:
        """Build `algorithm` from `algorithm_config` on the present policy, optimizer and reference."""
        config = self.config
        self.algorithm = build_algorithm(
            self.algorithm_config, policy=self.policy, optimizer=self.optimizer, accelerator=self.accelerator,
            minibatch_config=self._minibatch_config, seed=config.seed, reference=self._reference,
            reference_kl=loss_kl_estimator(config.kl_penalty, config.kl_placement), pretraining=self.pretraining,
        )  # fmt: skip

    def learn(self, responses: Responses) -> Statistics:
        """One iteration of Algorithm 1 (Schulman et al. 2017): score, shape rewards, estimate advantages, update.

        Returns:
            The classic's 40 statistics; `self.metrics` holds further ones.
        """
        timing: dict[str, float] = {}
        correction = self.importance_correction
        check_sampler_logprobs(responses, correction)
        check_learnable(responses, self.processes, has_critic=self.algorithm.has_critic)
        policy, sizes = self.accelerator.unwrap_model(self.policy), responses.inputs.costs()
        if self.config.token_budget is None and self._fitted_budget is None:
            self._fitted_budget = fitted_token_budget(self.processes, self.model, policy, self.optimizer, sizes)
        policy.work.clear()  # an evaluation may have counted in between
        with timed(timing, "total"), empty_cache_after(self.config.optimize_device_cache):
            with timed(timing, "forward_pass"):
                scored: ScoredResponses = self.reuse(self.scorer, responses)  # log π_old, V, log π_ref
            check_finite_scores(scored, responses.mask, self.processes, self.model)  # nothing has changed so far
            self.start_kl_check(scored, responses.mask)
            scores = normalize_scores(
                responses.scores, responses.mask, self.running, scale=self.config.use_score_scaling,
                shift=self.config.use_score_norm, clip=self.config.score_clip, reduce_sum=self.processes.reduce_sum,
                continues=responses.continues,
            )  # fmt: skip
            with timed(timing, "compute_rewards"):
                rollout, penalty = shape_rollout(replace(responses, scores=scores), scored, self._shaping())
            with timed(timing, "compute_advantages"):
                batch = self.algorithm.estimate_advantages(rollout)  # Â_t and value targets R_t
                batch, weights = correct_for_sampler(batch, responses, correction)  # if another engine sampled
            with timed(timing, "optimize_step"), self.update_context():
                record = self.algorithm.update(batch)  # K epochs on the surrogate; π_old ← π_θ
            self.last_batch = batch, scored
            with timed(timing, "calc_stats"):
                data = StepData.of(responses, scores, scored, penalty)
                bias = value_bias_by_position(batch.values, batch.returns, batch.mask, bins=BIAS_BINS)
                work = dict(policy.work), local_mismatch(scored.logprobs, responses, weights), torch.stack(bias).cpu()
                statistics = self._measure(data, record, work)
            if self.lr_scheduler is not None:
                # Accelerate's wrapper would step once per process.
                getattr(self.lr_scheduler, "scheduler", self.lr_scheduler).step()
        return statistics | {f"time/ppo/{name}": seconds for name, seconds in timing.items()}

    def _measure(
        self, local_data: StepData, record: UpdateRecord, local_work: tuple[dict[str, int], Any, Tensor]
    ) -> Statistics:
        """Statistics of a step over all processes; sets `metrics` and adapts the KL coefficient. Collective."""
        first, *rest = self.processes.gather_objects([local_data.cpu()])
        data: StepData = first.concatenate(rest)  # rows of all processes: what follows is the same on each
        statistics = classic_statistics(
            data, record, kl_coef=float(self.kl_ctl.value), learning_rate=learning_rate(self.optimizer),
            has_critic=self.algorithm.has_critic,
        )  # fmt: skip
        work, mismatches, biases = zip(*self.processes.gather_objects([local_work]), strict=True)
        self.metrics = extra_metrics(data, record) | work_metrics(work) | self.reuse.metrics()
        self.metrics |= mismatch_metrics(mismatches, self.importance_correction)
        if self.algorithm.has_critic:
            self.metrics |= bias_metrics(torch.stack(biases).sum(dim=0))
        if data.ref_logprobs is not None:
            warn_of_negative_kl(kl := float(statistics["objective/kl"]), self.config.kl_penalty)
            if not record.critic_only:
                self.kl_ctl.update(kl, len(data.scores))
        return statistics

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Save model, value head, tokenizer and a model card; the folder also loads as a plain causal LM."""
        self.save_weights(save_directory)
        if self.accelerator.is_main_process:
            self.tokenizer.save_pretrained(save_directory)
            write_model_card(Path(save_directory))

    def save_weights(self, save_directory: str | Path) -> None:
        """Save model, value head and a separate critic. Every process calls it; the main one writes."""
        with self.gathered_state_dict() as state:
            if self.accelerator.is_main_process:
                self.model.save_pretrained(save_directory, state_dict=state)
        if self.model.critic is not None:
            with self.gathered_parameters():
                if self.accelerator.is_main_process:
                    save_critic(self.model, Path(save_directory))

    @contextmanager
    def gathered_parameters(self, *, of_reference: bool = False) -> Iterator[None]:
        """Context manager: while active, every process holds the full parameters. All processes enter."""
        if of_reference and self._reference_is_whole:
            yield
            return
        model, prepared = (self.ref_model, self._reference) if of_reference else (None, None)
        with self.processes.gathered_parameters(model or self.model, prepared or self.policy):
            yield

    def gathered_state_dict(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Context manager: yields `model.state_dict()` with full tensors on the main process, {} on the others.

        All processes enter.
        """
        return self.processes.gathered_state_dict(self.model, self.policy)

    @property
    def importance_correction(self) -> ImportanceCorrection | None:
        """The present correction for tokens that another distribution sampled; None: none."""
        config = self.config
        return resolve_correction(
            config.importance_sampling, config.importance_sampling_level, config.importance_sampling_floor,
            config.importance_sampling_cap, self._differing_sampler,
        )  # fmt: skip

    def expect_sampler(self, differs: str | None) -> None:
        """Note why the distribution of the sampler is known to differ from the policy's; None: it does not."""
        is_new, self._differing_sampler = differs != self._differing_sampler, differs
        if is_new and self.accelerator.is_main_process:
            log_chosen_correction(self.importance_correction, differs)

    @property
    def limits(self) -> ModelLimits:
        """Limits that the inputs of `step()` are checked against."""
        language_model = self.model.pretrained_model
        return ModelLimits(
            batch_size=self.config.batch_size,
            needs_groups=self.algorithm.needs_groups,
            vocab_size=getattr(language_model.config.get_text_config(decoder=True), "vocab_size", None),
            max_positions=learned_positions(language_model),
            start_token_id=decoder_start_token(language_model) if self.is_encoder_decoder else None,
        )

    @property
    def scorer(self) -> Scorer:
        """A `Scorer` of policy and reference with the present settings."""
        return Scorer(
            policy=self.policy, reference=self._reference, kl_penalty=self.config.kl_penalty,
            reference_context=self.reference_context, rows=self.config.mini_batch_size,
            token_budget=self._minibatch_config().token_budget, max_passes=self.processes.max_passes,
        )  # fmt: skip

    def _minibatch_config(self) -> MinibatchConfig:
        config = self.config.minibatch()
        return replace(config, token_budget=config.token_budget or self._fitted_budget)

    def _shaping(self) -> RewardShaping:
        return RewardShaping(
            kl_coef=float(self.kl_ctl.value), kl_placement=self.config.kl_placement,
            whiten_rewards=self.config.whiten_rewards, gamma=self.config.gamma, lam=self.config.lam,
            classic_padding=self.algorithm_config == self.config.algorithm(),
            separate_prompts=self.is_encoder_decoder, reduce_sum=self.processes.reduce_sum,
            reduce_max=self.processes.reduce_max,
        )  # fmt: skip
