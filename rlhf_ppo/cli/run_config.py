"""The settings of `rlhf-ppo ppo`."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rlhf_ppo.utils.field_types import check_fields

SECTIONS = ("ppo", "train", "sampling", "algorithm_config")
"""Fields of `RunConfig` that hold fields of another configuration."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What `rlhf-ppo ppo` runs."""

    model: str = "gpt2"
    """Folder or hub name of the policy."""
    prompts: str = ""
    """File, folder or hub dataset with a column `prompt`, or a number of episodes."""
    reward: str | None = None
    """module:name or file.py:name of a function, a reward model's folder or name, or a URL."""
    environment: str | None = None
    """module:name or file.py:name of an environment class."""
    eval_prompts: str | None = None
    """Held-out prompts, as --prompts."""
    encoding: str | None = None
    """Encoding of text files of prompts, such as cp1252; None: UTF-8, or what a byte order mark says."""
    algorithm: str | None = None
    """ppo-clip, ppo-penalty, trpo, reinforce, reinforce++, rloo, grpo or gspo; None: the preset's, or ppo-clip."""
    preset: str | None = None
    """Settings of a published run (docs/presets.md)."""
    sampler: str = "loop"
    """What generates (docs/engines.md)."""
    lora_rank: int = 0
    """Rank of LoRA adapters, 0 for none."""
    output_dir: str = "runs/ppo"
    """Run folder, where the same command resumes."""
    live: bool = False
    """Serve the run's report while it trains."""
    live_address: str | None = None
    """HOST:PORT of --live (127.0.0.1:8019, or a free port)."""
    ppo: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    algorithm_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)


def refuse_unknown(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise a ValueError that names the nearest setting if there is none of this name."""
    names = sorted(known)
    for name in given:
        if name not in names:
            raise ValueError(f"there is no {what} {name!r}{_close(name, names)}. Known: {', '.join(names)}.")


def _close(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""
