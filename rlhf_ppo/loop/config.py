"""`TrainConfig`, the settings of the managed loop, and `TrainState`, its progress."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from rlhf_ppo.diagnostics.guards import Guards
from rlhf_ppo.environments import EpisodeConfig
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.loop.curriculum import Curriculum
from rlhf_ppo.loop.dynamic_sampling import DynamicSampling
from rlhf_ppo.loop.evaluation import Evaluation
from rlhf_ppo.rewards.failures import RAISE_ON_FAILURE, RewardFailures
from rlhf_ppo.rollout.collect import MissingEOS, SoftOverlong
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.utils.field_types import check_fields


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `PPOTrainer.train`."""

    iterations: int = 100
    """Number of rollouts, each of `PPOConfig.batch_size` responses per process."""
    sampling: SamplingConfig
    """How responses are sampled. Its temperature must be the same as `PPOConfig.temperature`."""
    output_dir: str | None = None
    """Run folder; None: `PPOConfig.output_dir`. If both are None, nothing is written."""
    eval_every: int = 0
    """Iterations between two evaluations on the held-out prompts; 0: no evaluation."""
    save_every: int = 0
    """Iterations between two checkpoints; 0: only when the loop is stopped early, or ended by an error."""
    keep_last: int = 2
    """Number of checkpoints kept."""
    keep_best: str | None = None
    """Measure of the held-out evaluation, e.g. "score": `best/` keeps the model in which it is largest; None: none."""
    keep_frontier: int = 0
    """Number of Pareto-optimal models (high `keep_best`, low KL to the reference) kept in `frontier/`."""
    max_reference_kl: float | None = None
    """KL budget, nats per response. The run stops when a rollout exceeds it. No model beyond it is kept as the best."""
    episodes: EpisodeConfig = field(default_factory=EpisodeConfig)
    """Settings of episodes with an environment: limits, concurrency, retries. Do not set it without an environment."""
    missing_eos: MissingEOS | None = None
    """Penalty of a response that reached `max_new_tokens` without a stop token; None: no penalty."""
    overlong: SoftOverlong | None = None
    """Penalty that grows over the last tokens before `max_new_tokens`; None: no penalty."""
    mask_truncated: bool = False
    """Leave responses without a stop token out of the loss; they still count in baselines and statistics."""
    best_of: int | None = None
    """Learn only from the `best_of` responses to each prompt with the highest scores (best-of-n); None: from all."""
    dynamic_sampling: DynamicSampling | None = None
    """Replace groups in which all responses have the same score; None: keep them."""
    curriculum: Curriculum | None = None
    """Prefer prompts that the policy solves sometimes; None: use all prompts equally often."""
    guards: Guards = field(default_factory=Guards)
    """Guards against reward hacking, each with a limit, an action and a patience."""
    offload_rewards: bool = False
    """Keep the models of reward sources on the CPU between calls; useful if they share a GPU with the policy. They are
    found as the source itself, as its attributes, or one level below, such as the members of an ensemble."""
    reward_failures: RewardFailures = RAISE_ON_FAILURE
    """How often a failing reward source is retried, and whether its samples are then dropped."""
    keep_history: int = 200
    """Number of iterations whose metrics are in `TrainState.history`; `metrics.jsonl` has all of them."""
    reward_calls: Literal["each", "once"] = "each"
    """"each": every process calls the reward sources with its own samples; "once": process 0 calls them once with the
    samples of all processes."""
    max_time: float | None = None
    """Time limit of the loop, seconds. If one more iteration would exceed it, the loop stops with a checkpoint."""
    resume: bool = True
    """Resume from the latest intact checkpoint in `output_dir`."""
    progress: bool = True
    """Show a progress bar on the main process."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, minimum in {
            "iterations": 1, "keep_last": 1, "eval_every": 0, "save_every": 0, "keep_frontier": 0,
            "keep_history": 1,
        }.items():  # fmt: skip
            if getattr(self, name) < minimum:
                raise ValueError(
                    f"TrainConfig.{name} must be at least {minimum}, got {getattr(self, name)}: there would be nothing "
                    f"to do or to keep. Use {minimum} or more."
                )
        if self.max_time is not None and not self.max_time > 0:
            raise ValueError(
                f"TrainConfig.max_time must be a positive number of seconds, got {self.max_time}: the run would end "
                "before it began. Use None for no limit."
            )
        if self.keep_best is not None and not self.eval_every:
            raise ValueError(
                f"expected held-out evaluations for keep_best={self.keep_best!r}, got eval_every=0: no model could be "
                "compared. Set eval_every, and pass eval_prompts to train()."
            )
        if self.keep_frontier and self.keep_best is None:
            raise ValueError('keep_frontier compares models by `keep_best` and KL: set keep_best, e.g. to "score"')
        best_guards = [
            name for name, guard in self.guards.each() if guard.limit is not None and guard.action == "keep_best"
        ]
        if best_guards and self.keep_best is None:
            raise ValueError(
                f"expected keep_best for the action of guards.{best_guards[0]}, got none: no best model is kept that "
                'the guard could protect. Set keep_best (and eval_every), or the action "warn" or "stop".'
            )


@dataclass(kw_only=True)
class TrainState:
    """Progress of the managed loop, as callbacks see it and `train` returns it."""

    iteration: int = 0
    """Number of finished iterations."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last iteration."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of the last `TrainConfig.keep_history` iterations of this call."""
    evaluation: Evaluation | None = None
    """The last held-out evaluation."""
    best: float | None = None
    """Best held-out mean of `keep_best` so far."""
    stopped: str | None = None
    """Why the loop ended before its last iteration."""
    interrupted: bool = False
    """Whether a signal or the time limit stopped it: the same call resumes from the checkpoint."""


Callback: TypeAlias = Callable[[PPOLearner, TrainState], object]
"""Called after every iteration; returning True stops the loop. Its state is saved if it has `state_dict` and
`load_state_dict`."""


def check_settings(learner: PPOLearner, config: TrainConfig) -> None:
    """Raise a ValueError if settings of the loop, the learner and the tokenizer disagree."""
    sampling = config.sampling
    vocab_size = learner.limits.vocab_size
    if vocab_size is not None and len(learner.tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer's ids go up to {len(learner.tokenizer) - 1}, but the model has {vocab_size} embeddings: "
            "they do not belong together. Load the model's own tokenizer, or resize the model's token embeddings."
        )
    if sampling.do_sample and sampling.temperature != learner.config.temperature:
        raise ValueError(
            f"sampling.temperature is {sampling.temperature}, PPOConfig.temperature {learner.config.temperature}: "
            "probability ratios and KL would be those of another distribution. Give both the same value."
        )
    if learner.config.batch_size % sampling.num_return_sequences:
        raise ValueError(
            f"batch_size {learner.config.batch_size} must be a multiple of num_return_sequences "
            f"{sampling.num_return_sequences}: all responses to a prompt must be in one batch"
        )
    wants_kl = config.max_reference_kl is not None or config.guards.kl.limit is not None or config.keep_frontier
    if wants_kl and not learner.has_reference:
        raise ValueError(
            "expected a KL to the reference for max_reference_kl, guards.kl and keep_frontier, got kl_penalty='none': "
            "none is measured, so the limit would never act. Choose kl_penalty='kl', with init_kl_coef=0 if it shall "
            "only be watched."
        )
    _check_selection(learner, config)


def check_groups(learner: PPOLearner, config: TrainConfig) -> None:
    """Raise a ValueError if an algorithm that compares responses to one prompt would get one alone to learn from."""
    if learner.algorithm.needs_groups and config.sampling.num_return_sequences < 2:
        raise ValueError("this algorithm compares responses to one prompt: set num_return_sequences to 2 or more")


def _check_selection(learner: PPOLearner, config: TrainConfig) -> None:
    copies, best_of, overlong = config.sampling.num_return_sequences, config.best_of, config.overlong
    if config.dynamic_sampling is not None and copies < 2:
        raise ValueError(
            f"dynamic_sampling compares responses to one prompt, got num_return_sequences={copies}: a single response "
            "has no spread, and every prompt would be sampled anew. Set num_return_sequences to 2 or more."
        )
    least = 2 if learner.algorithm.needs_groups else 1
    if best_of is not None and not least <= best_of < copies:
        raise ValueError(
            f"best_of must be at least {least} and below num_return_sequences={copies}, got {best_of}: there would be "
            "nothing to choose or to compare. Sample more responses per prompt, or set it to None."
        )
    if overlong is not None and overlong.buffer > config.sampling.max_new_tokens:
        raise ValueError(
            f"overlong.buffer must be at most max_new_tokens={config.sampling.max_new_tokens}, got {overlong.buffer}: "
            "every response would be penalized. DAPO uses a fifth of the length."
        )
