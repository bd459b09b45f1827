"""Settings of the managed loop, and where it stands."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from rlhf_ppo.diagnostics.guards import Guards
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.loop.evaluation import Evaluation
from rlhf_ppo.rewards.failures import RAISE_ON_FAILURE, RewardFailures
from rlhf_ppo.rollout.collect import MissingEOS
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.utils.field_types import check_fields


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `PPOTrainer.train`."""

    iterations: int = 100
    """Rollouts, each of `PPOConfig.batch_size` responses a process."""
    sampling: SamplingConfig
    """How responses are drawn; its temperature must be that of `PPOConfig`."""
    output_dir: str | None = None
    """Run folder; None: nothing is written."""
    eval_every: int = 0
    """Evaluate on the held-out prompts every so many iterations; 0: never inside the loop."""
    save_every: int = 0
    """Checkpoint every so many iterations; 0: only when the loop is stopped from outside."""
    keep_last: int = 2
    """Checkpoints kept."""
    keep_best: str | None = None
    """Measure of the held-out evaluation, e.g. "score": its best model is kept in `best/`. None: none is."""
    keep_frontier: int = 0
    """Models kept in `frontier/` of those that no other beats in both `keep_best` and KL to the reference."""
    max_reference_kl: float | None = None
    """KL budget, nats a response: stop when a rollout exceeds it, and never keep a "best" model beyond it."""
    missing_eos: MissingEOS | None = None
    """What a response costs that ran to `max_new_tokens` without a stop token; None: nothing."""
    guards: Guards = field(default_factory=Guards)
    """Lines against reward hacking: each a limit, an action, a patience."""
    offload_rewards: bool = False
    """Models of reward sources wait in main memory between questions; only where they share a GPU with the policy."""
    reward_failures: RewardFailures = RAISE_ON_FAILURE
    """How often a failing reward source is asked again, and whether its samples are then dropped."""
    keep_history: int = 200
    """Iterations whose metrics stay in memory, in `TrainState.history`; `metrics.jsonl` has those of all."""
    reward_calls: Literal["each", "once"] = "each"
    """Whether every process asks the reward sources about its own samples, or process 0 about those of all processes in
    one request; on the others they are then never called."""
    max_time: float | None = None
    """Seconds within which the loop ends: it stops, with a checkpoint, when one more iteration would not fit."""
    resume: bool = True
    """Go on from the newest whole checkpoint in `output_dir`."""
    progress: bool = True
    """Show a progress bar on the main process."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name, least in {
            "iterations": 1, "keep_last": 1, "eval_every": 0, "save_every": 0, "keep_frontier": 0,
            "keep_history": 1,
        }.items():  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(
                    f"TrainConfig.{name} must be at least {least}, got {getattr(self, name)}: there would be nothing "
                    f"to do or to keep. Use {least} or more."
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
        unkept = [name for name, guard in self.guards.each() if guard.limit is not None and guard.action == "keep_best"]
        if unkept and self.keep_best is None:
            raise ValueError(
                f"expected keep_best for the action of guards.{unkept[0]}, got none: no best model is kept that the "
                'line could protect. Set keep_best (and eval_every), or the action "warn" or "stop".'
            )


@dataclass(kw_only=True)
class TrainState:
    """Where the loop stands; what callbacks see."""

    iteration: int = 0
    """Iterations finished."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last iteration."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Of the last iterations of this call, as many as `TrainConfig.keep_history`."""
    evaluation: Evaluation | None = None
    """The newest."""
    best: float | None = None
    """Best held-out mean of `keep_best` so far."""
    stopped: str | None = None
    """Why the loop ended before its last iteration."""
    interrupted: bool = False
    """Whether it was stopped by a signal or the time limit: the same call goes on from the checkpoint."""


Callback: TypeAlias = Callable[[PPOLearner, TrainState], object]
"""Called after every iteration; returning True stops the loop. With `state_dict` and `load_state_dict`, it is saved."""


def check_settings(learner: PPOLearner, config: TrainConfig) -> None:
    """Refuse settings that do not go together.

    Raises:
        ValueError: Naming both, before anything is drawn.
    """
    sampling = config.sampling
    vocab_size = learner.limits.vocab_size
    if vocab_size is not None and len(learner.tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer's ids go up to {len(learner.tokenizer) - 1}, but the model has {vocab_size} embeddings: "
            "they do not belong together. Load the model's own tokenizer, or resize the model's token embeddings."
        )
    if sampling.temperature != learner.config.temperature:
        raise ValueError(
            f"sampling.temperature is {sampling.temperature}, PPOConfig.temperature {learner.config.temperature}: "
            "probability ratios and KL would be those of another distribution. Give both the same value."
        )
    if learner.config.batch_size % sampling.num_return_sequences:
        raise ValueError(
            f"batch_size {learner.config.batch_size} must be a multiple of num_return_sequences "
            f"{sampling.num_return_sequences}: a prompt's responses stand in one batch"
        )
    if learner.algorithm.needs_groups and sampling.num_return_sequences < 2:
        raise ValueError("this algorithm compares responses to one prompt: set num_return_sequences to 2 or more")
