"""Settings of the recipe in groups, and the values that suit a model, an algorithm and a published run."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

import torch

from rlhf_ppo import (
    GRPO,
    RLOO,
    TRPO,
    AlgorithmConfig,
    PPOClip,
    PPOConfig,
    PPOPenalty,
    Reinforce,
)
from rlhf_ppo.algorithms import Critic
from rlhf_ppo.diagnostics.guards import Guards
from rlhf_ppo.presets import ClassicPresetName, published_run

from .command_line import FloatByModel, IntByCores, IntByLength, IntByModel, SwitchByModel
from .engines import EngineSettings
from .language_models import SMALL_GPT2, SMOLLM2_135M
from .rewards import AdapterSettings

AlgorithmName: TypeAlias = Literal["ppo-clip", "ppo-penalty", "trpo", "reinforce", "rloo", "grpo"]


@dataclass(frozen=True)
class AlgorithmChoice:
    """An algorithm as the recipe runs it."""

    config: Callable[[float], AlgorithmConfig]
    """From the weight of the value loss."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from those of PPO-Clip, which the model's settings were found with."""
    in_float32: bool = False
    """Whether its arithmetic bears no bfloat16."""


ALGORITHMS: dict[AlgorithmName, AlgorithmChoice] = {
    "ppo-clip": AlgorithmChoice(lambda vf_coef: PPOClip(critic=Critic(vf_coef=vf_coef))),
    "ppo-penalty": AlgorithmChoice(lambda vf_coef: PPOPenalty(critic=Critic(vf_coef=vf_coef))),
    "trpo": AlgorithmChoice(lambda _: TRPO(max_kl=0.02, curvature_fraction=0.125), in_float32=True),
    "reinforce": AlgorithmChoice(lambda _: Reinforce()),
    "rloo": AlgorithmChoice(lambda _: RLOO(), {"group_size": 4}),
    "grpo": AlgorithmChoice(lambda _: GRPO(), {"group_size": 4}),
}

_RENAMED = {
    "batch_size": "batch_size", "mini_batch_size": "mini_batch_size", "ppo_epochs": "ppo_epochs",
    "learning_rate": "learning_rate", "vf_coef": "vf_coef", "init_kl_coef": "kl_coef", "target": "kl_target",
    "horizon": "kl_horizon",
}  # fmt: skip
"""Settings of `PPOConfig` that the recipe has flags for, under the flags' names."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What suits a model; the command line overrides each."""

    iterations: int
    batch_size: int
    mini_batch_size: int
    learning_rate: float
    kl_coef: float
    kl_target: float
    kl_horizon: float = 2000.0
    ppo_epochs: int = 2
    vf_coef: float = 0.5
    score_clip: float = 3.0
    lora_rank: int = 0
    bfloat16: bool = False
    group_size: int = 1

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "mini_batch_size", "ppo_epochs", "group_size"):
            at_least(self, **{name: 1})
        for name in ("learning_rate", "kl_target", "kl_horizon", "score_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        at_least(self, kl_coef=0, vf_coef=0, lora_rank=0)
        if self.batch_size % self.mini_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of mini_batch_size {self.mini_batch_size}: a rest would "
                "be dropped. Choose --batch-size and --mini-batch-size that divide"
            )


def at_least(settings: object, **least: float) -> None:
    """Raise a ValueError for the first setting that is below its minimum."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}")


def model_settings(model: str) -> ModelSettings:
    """Settings for an embedded model; for any other those of the classic sentiment example."""
    if model == SMALL_GPT2:
        return ModelSettings(
            iterations=50, batch_size=128, mini_batch_size=32, learning_rate=3e-4, kl_coef=0.06, kl_target=11.0
        )
    if model == SMOLLM2_135M:
        return ModelSettings(
            iterations=40, batch_size=64, mini_batch_size=16, learning_rate=4e-4, kl_coef=0.04, kl_target=14.0,
            lora_rank=16, bfloat16=True,
        )  # fmt: skip
    return ModelSettings(
        iterations=100,
        batch_size=128,
        mini_batch_size=128,
        learning_rate=1.41e-5,
        kl_coef=0.2,
        kl_target=6.0,
        kl_horizon=10_000.0,
        ppo_epochs=4,
    )


def resolve_settings(model: str, flags: "RecipeSettings") -> ModelSettings:
    """The settings of `model`, changed by the algorithm, then by `--preset`, then by the flags that are not None."""
    settings = replace(model_settings(model), **ALGORITHMS[flags.algorithm].changes | flags.preset_flags)
    named = {item.name: getattr(flags, item.name) for item in fields(ModelSettings)}
    return replace(settings, **{name: value for name, value in named.items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class SettingsByModel:
    """None: what `model_settings` says of the model."""

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
    log_with: Literal["tensorboard", "wandb", "trackio"] | None = "tensorboard"
    """Tracker."""
    live: bool = False
    """Serve the report while PPO trains, to browsers of this machine."""
    live_address: str | None = None
    """HOST:PORT of --live; default: 127.0.0.1:8019, or a free port (docs/live.md)."""

    def saved_every(self, iterations: int) -> int:
        """Iterations between two checkpoints of that many."""
        return max(1, iterations // 25) if self.save_every is None else self.save_every


@dataclass(frozen=True, kw_only=True)
class AlgorithmSettings:
    """What is optimized, and with whose numbers."""

    algorithm: AlgorithmName = "ppo-clip"
    """What is optimized."""
    preset: ClassicPresetName | None = None
    """Numbers of a published run (rlhf_ppo.presets) instead of those that suit the model."""

    def algorithm_config(self, vf_coef: float) -> AlgorithmConfig:
        """The algorithm, with this weight of the value loss where it has one."""
        return ALGORITHMS[self.algorithm].config(vf_coef)

    @property
    def preset_flags(self) -> dict[str, Any]:
        """Those of the recipe's own settings that the preset sets."""
        return {_RENAMED[key]: value for key, value in self._published.items() if key in _RENAMED}

    @property
    def ppo_settings(self) -> dict[str, Any]:
        """Those of `PPOConfig`'s other settings that the preset sets; how long a run is stays the recipe's."""
        return {key: value for key, value in self._published.items() if key not in _RENAMED and key != "steps"}

    @property
    def adam_settings(self) -> dict[str, Any]:
        """For `rlhf_ppo.updates.optimizers.adam`."""
        config = PPOConfig(**self.ppo_settings)
        return {"eps": config.adam_eps, "tensorflow": config.optimizer == "adam_tensorflow"}

    @property
    def precision(self) -> dict[str, str]:
        """bfloat16 arithmetic where the processor computes in it, for `Accelerator`; weights keep their own dtype."""
        if ALGORITHMS[self.algorithm].in_float32:
            return {}
        if torch.cuda.is_available():
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = bool(torch.cpu._is_avx512_bf16_supported())
        return {"mixed_precision": "bf16"} if fast else {}

    @property
    def _published(self) -> Mapping[str, Any]:
        return {} if self.preset is None else published_run(self.preset).settings


@dataclass(frozen=True, kw_only=True)
class RecipeSettings(SettingsByModel, AlgorithmSettings, AdapterSettings, GuardSettings, EngineSettings, RunSettings):
    """All groups together."""

    @property
    def train_settings(self) -> dict[str, Any]:
        """Arguments of `TrainConfig` that are settings or the preset's."""
        return {
            "guards": self.guards, "eval_every": self.eval_every, "keep_best": "score" if self.eval_every else None,
            "reward_calls": self.reward_calls,
            "missing_eos": None if self.preset is None else published_run(self.preset).missing_eos,
        }  # fmt: skip
