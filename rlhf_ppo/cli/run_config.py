"""The settings of `rlhf-ppo ppo`."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SECTIONS = ("ppo", "train", "sampling", "algorithm_config")
"""Fields of `RunConfig` that hold fields of another configuration."""


def _setting(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What `rlhf-ppo ppo` runs; the help of each setting is that of its flag."""

    model: str = _setting("gpt2", "folder or hub name of the policy")
    prompts: str = _setting("", "file, folder or hub dataset with a column `prompt`, or a number of episodes")
    reward: str | None = _setting(
        None, "function as module:name or file.py:name, reward model's folder or hub name, or URL"
    )
    environment: str | None = _setting(None, "module:name or file.py:name of an environment class")
    eval_prompts: str | None = _setting(None, "held-out prompts, as --prompts")
    algorithm: str = _setting("ppo-clip", "ppo-clip, ppo-penalty, trpo, reinforce, reinforce++, rloo, grpo or gspo")
    preset: str | None = _setting(None, "settings of a published run (docs/presets.md)")
    sampler: str = _setting("loop", "what generates (docs/engines.md)")
    lora_rank: int = _setting(0, "rank of LoRA adapters; 0 trains all weights")
    output_dir: str = _setting("runs/ppo", "run folder; the same command resumes there")
    live: bool = _setting(False, "serve the run's report while it trains")
    live_address: str | None = _setting(None, "HOST:PORT of --live (127.0.0.1:8019, or a free port)")
    ppo: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    algorithm_config: dict[str, Any] = field(default_factory=dict)


def refuse_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse a name that no setting has.

    Raises:
        ValueError: Names it and the nearest one.
    """
    names = sorted(known)
    for name in given:
        if name not in names:
            raise ValueError(f"there is no {what} {name!r}{_close(name, names)}. Known: {', '.join(names)}.")


def _close(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
