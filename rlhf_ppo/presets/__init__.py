"""Settings of published runs, each value with its source.

They are starting points for similar tasks and sizes only: a learning rate of 3e-6 was found for models of billions of
weights. `remarks` names what settings do not reproduce (data, reward model, implementation details).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from rlhf_ppo.algorithms import AlgorithmConfig
from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.loop.dynamic_sampling import DynamicSampling
from rlhf_ppo.presets.verifiable_rewards import RECENT, Values
from rlhf_ppo.rollout.collect import MissingEOS, SoftOverlong
from rlhf_ppo.utils.moved_names import forward_old_names

ClassicPresetName: TypeAlias = Literal["ziegler2019", "stiennon2020", "nplus2024", "trl-classic"]
"""Presets of PPO from the classic fields of `PPOConfig`."""
PresetName: TypeAlias = ClassicPresetName | Literal["orz", "vapo", "turn-ppo", "sao", "dapo", "dr-grpo", "gspo"]


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """Settings of a published run, with sources."""

    title: str
    settings: Mapping[str, Any]
    """Fields of `PPOConfig`; all others keep their defaults. A paper's sizes and steps are those of all processes,
    the fields are per process: divide them by the number of processes."""
    sources: Mapping[str, str]
    """Source of each value in `settings` and of each field below."""
    new_tokens: int | None = None
    """Maximum tokens of a response; None: not part of the preset."""
    missing_eos: MissingEOS | None = None
    anneal: bool = False
    """Whether the learning rate decays linearly to 0."""
    separate_critic: bool = False
    """Whether the value function was a separate network (`attach_critic`)."""
    algorithm: AlgorithmConfig | None = None
    """What was optimized, for `PPOTrainer(algorithm=)`; None: PPO from the classic fields of `settings`."""
    group_size: int | None = None
    """Responses per prompt (`SamplingConfig.num_return_sequences`); None: 1, or not named."""
    overlong_share: float | None = None
    """Share of the maximum length over which `SoftOverlong` penalized; None: it did not."""
    dynamic_sampling: bool = False
    """Whether groups of equal scores were sampled anew (`TrainConfig.dynamic_sampling`)."""
    remarks: str = ""
    """What the settings do not reproduce."""

    def config(self, **changes: Any) -> PPOConfig:
        """Make a `PPOConfig` with these settings; `changes` override them."""
        return PPOConfig(**{**self.settings, **changes})

    def train_settings(self, new_tokens: int) -> dict[str, Any]:
        """Fields of `TrainConfig` that the preset sets, for responses of at most `new_tokens` tokens."""
        share = self.overlong_share
        return {
            "missing_eos": self.missing_eos,
            "overlong": None if share is None else SoftOverlong(buffer=max(1, round(share * new_tokens))),
            "dynamic_sampling": DynamicSampling() if self.dynamic_sampling else None,
        }


_LHP = "openai/lm-human-preferences"
_ZIEGLER: dict[str, tuple[Any, str]] = {
    "steps": (1_000_000, f"{_LHP}, launch.py: total_episodes"),
    "batch_size": (512, f"{_LHP}, launch.py: ppo.batch_size; over all processes there"),
    "mini_batch_size": (512, f"{_LHP}, train_policy.py: ppo.nminibatches = 1"),
    "ppo_epochs": (4, f"{_LHP}, train_policy.py: ppo.noptepochs"),
    "learning_rate": (1e-5, f"{_LHP}, launch.py: ppo.lr of sentiment and descriptiveness"),
    "adam_eps": (1e-5, f"{_LHP}, train_policy.py; Huang et al. (2023), The N implementation details"),
    "optimizer": ("adam_tensorflow", "Huang et al. (2023), The N implementation details, section on Adam"),
    "init_kl_coef": (0.15, f"{_LHP}, launch.py: rewards.kl_coef"),
    "target": (6.0, f"{_LHP}, launch.py: rewards.adaptive_kl.target"),
    "horizon": (10_000.0, f"{_LHP}, launch.py: rewards.adaptive_kl.horizon"),
    "gamma": (1.0, f"{_LHP}, train_policy.py: ppo.gamma"),
    "lam": (0.95, f"{_LHP}, train_policy.py: ppo.lam"),
    "cliprange": (0.2, f"{_LHP}, train_policy.py: ppo.cliprange"),
    "cliprange_value": (0.2, f"{_LHP}, train_policy.py: ppo.cliprange_value"),
    "vf_coef": (0.1, f"{_LHP}, train_policy.py: ppo.vf_coef"),
    "whiten_rewards": (True, f"{_LHP}, train_policy.py: ppo.whiten_rewards, the mean kept"),
    "temperature": (0.7, f"{_LHP}, launch.py: policy.temperature"),
}
_NPLUS = "vwxyzjn/summarize_from_feedback_details, ppo.py; Huang et al. (2024), arXiv 2403.17031"
_NPLUS2024: dict[str, tuple[Any, str]] = {
    "steps": (1_000_000, _NPLUS),
    "batch_size": (512, f"{_NPLUS}; over all processes there"),
    "mini_batch_size": (512, f"{_NPLUS}: one minibatch"),
    "ppo_epochs": (4, _NPLUS),
    "learning_rate": (3e-6, _NPLUS),
    "adam_eps": (1e-5, _NPLUS),
    "adap_kl_ctrl": (False, f"{_NPLUS}: the coefficient is fixed"),
    "init_kl_coef": (0.05, _NPLUS),
    "gamma": (1.0, _NPLUS),
    "lam": (0.95, _NPLUS),
    "cliprange": (0.2, _NPLUS),
    "cliprange_value": (0.2, _NPLUS),
    "vf_coef": (0.1, _NPLUS),
    "whiten_rewards": (False, f"{_NPLUS}: off in the final runs"),
    "temperature": (0.7, _NPLUS),
}
_STIENNON = "Stiennon et al. (2020), arXiv 2009.01325, appendix B.1"
_STIENNON2020: dict[str, tuple[Any, str]] = {
    "steps": (1_000_000, _STIENNON),
    "batch_size": (512, f"{_STIENNON}: 512 at 1.3B weights, 256 at 6.7B"),
    "mini_batch_size": (512, f"{_STIENNON}: one minibatch"),
    "ppo_epochs": (4, _STIENNON),
    "learning_rate": (1.5e-5, f"{_STIENNON}: 1.5e-5 at 1.3B weights, 7e-6 at 6.7B"),
    "adap_kl_ctrl": (False, f"{_STIENNON}: the coefficient is fixed"),
    "init_kl_coef": (0.05, _STIENNON),
    "gamma": (1.0, _STIENNON),
    "lam": (0.95, _STIENNON),
}
_TRL = "TRL 0.11.4, trl/trainer/ppo_config.py"
_CLASSIC: dict[str, Any] = {
    "steps": 20_000, "batch_size": 128, "mini_batch_size": 128, "ppo_epochs": 4, "learning_rate": 1.41e-5,
    "adap_kl_ctrl": True, "init_kl_coef": 0.2, "target": 6.0, "horizon": 10_000.0, "gamma": 1.0, "lam": 0.95,
    "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "temperature": 1.0,
}  # fmt: skip


def _make_run(
    title: str, values: Mapping[str, tuple[Any, str]], field_sources: Mapping[str, str] | None = None, **fields: Any
) -> PublishedRun:
    return PublishedRun(
        title=title,
        settings=MappingProxyType({name: value for name, (value, _) in values.items()}),
        sources=MappingProxyType({name: source for name, (_, source) in values.items()} | dict(field_sources or {})),
        **fields,
    )


def _recent_run(title: str, values: Values, fields: Values, remarks: str) -> PublishedRun:
    return _make_run(
        title, values, {name: source for name, (_, source) in fields.items()}, remarks=remarks,
        **{name: value for name, (value, _) in fields.items()},
    )  # fmt: skip


PRESETS: Mapping[str, PublishedRun] = MappingProxyType(
    {
        "ziegler2019": _make_run(
            "Fine-tuning language models from human preferences", _ZIEGLER,
            {
                "new_tokens": f"{_LHP}, launch.py: task.response_length",
                "missing_eos": f"{_LHP}, train_policy.py: a score of -1 without a stop token",
                "anneal": f"{_LHP}, train_policy.py: the rate decays linearly to 0",
            },
            new_tokens=24, missing_eos=MissingEOS(penalty=1.0, mode="replace"), anneal=True,
            remarks="It whitened with the variance divided by n and learned from all 24 tokens; this library divides "
            "by n - 1 and learns from the tokens up to the stop token.",
        ),
        "stiennon2020": _make_run(
            "Learning to summarize from human feedback", _STIENNON2020,
            {
                "anneal": f"{_STIENNON}: linear decay",
                "separate_critic": f"{_STIENNON}: a value network initialized from the reward model",
            },
            anneal=True, separate_critic=True,
            remarks="Temperature, clip ranges and the weight of the value loss are PPOConfig's defaults: the source "
            "names none. `rlhf-ppo ppo` initializes the critic from the policy.",
        ),
        "nplus2024": _make_run(
            "The N+ implementation details of RLHF with PPO", _NPLUS2024,
            {
                "new_tokens": _NPLUS, "missing_eos": f"{_NPLUS}: a score of -1 without a stop token",
                "anneal": _NPLUS, "separate_critic": f"{_NPLUS}: a value model initialized from the reward model",
            },
            new_tokens=53, missing_eos=MissingEOS(penalty=1.0, mode="replace"), anneal=True, separate_critic=True,
            remarks="It placed the score after the stop token; this library places it at the stop token. `rlhf-ppo "
            "ppo` initializes the critic from the policy.",
        ),
        "trl-classic": _make_run(
            "Defaults of TRL's classic PPOConfig", {name: (value, _TRL) for name, value in _CLASSIC.items()}
        ),
        **{name: _recent_run(**run) for name, run in RECENT.items()},
    }
)  # fmt: skip


def published_run(name: str) -> PublishedRun:
    """Return the settings of a published run by name.

    Raises:
        ValueError: There is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}, there are {', '.join(PRESETS)}")
    return PRESETS[name]


forward_old_names(__name__)
