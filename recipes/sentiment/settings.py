"""Settings of the recipe in groups: what suits the model unless it is given, the guards, how a run is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_ppo.diagnostics.guards import Guards

from .command_line import FloatByModel, IntByCores, IntByLength, IntByModel, SwitchByModel


@dataclass(frozen=True, kw_only=True)
class SettingsByModel:
    """None: what `stages.preset` knows of the model."""

    iterations: IntByModel = None
    """Rollouts."""
    batch_size: IntByModel = None
    """Responses of one rollout, on each process."""
    mini_batch_size: IntByModel = None
    """Responses of one optimizer step, on each process."""
    learning_rate: FloatByModel = None
    """Peak; it falls to 0 along a straight line."""
    kl_coef: FloatByModel = None
    """Initial coefficient of the KL penalty in the reward."""
    kl_target: FloatByModel = None
    """KL of a response, nats, that the adaptive controller aims at."""
    kl_horizon: FloatByModel = None
    """Responses over which the adaptive controller acts; smaller is quicker."""
    ppo_epochs: IntByModel = None
    """Passes over a rollout."""
    vf_coef: FloatByModel = None
    """Weight of the value loss."""
    score_clip: FloatByModel = None
    """Scores are clipped to this range, so that an extreme score is no better than a good one."""
    bfloat16: SwitchByModel = None
    """Frozen weights in bfloat16; adapters and value head stay in float32."""
    group_size: IntByModel = None
    """Responses to a prompt in one rollout; rloo and grpo compare them."""
    lora_rank: IntByModel = None
    """Rank of LoRA adapters; 0 trains every weight."""


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """Lines that a policy which games its reward would cross (docs/guards.md)."""

    guards: Guards = field(default_factory=Guards)
    """Each with a limit, an action and a patience; without a limit the number is only recorded."""
    eval_every: int = 0
    """Held-out evaluation every so many iterations of PPO; the best model by score is kept in best/. The judge's line
    and the action keep_best need it."""

    @property
    def guarding(self) -> dict[str, Any]:
        """The same for `TrainConfig`."""
        return {
            "guards": self.guards, "eval_every": self.eval_every, "keep_best": "score" if self.eval_every else None,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How a run is kept, ended and watched; none of them changes what is learned."""

    save_every: IntByLength = None
    """Iterations between two checkpoints of PPO; 0: none but at the end."""
    max_time: float | None = None
    """Seconds in all; PPO stops in time, with a checkpoint and exit status 75, and the same command goes on."""
    fresh: bool = False
    """Ignore checkpoints in the run folder."""
    threads: IntByCores = None
    """PyTorch threads."""
    log_with: Literal["tensorboard", "wandb"] | None = "tensorboard"
    """Tracker."""

    def saved_every(self, iterations: int) -> int:
        """Iterations between two checkpoints of that many."""
        return max(1, iterations // 25) if self.save_every is None else self.save_every
