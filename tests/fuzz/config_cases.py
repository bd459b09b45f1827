"""Settings of every configuration, right names with wrong values and the reverse; and JSON files of settings."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from reward_model.models.contract import CONTRACT_FILE, Contract
from rlhf_ppo import PPOConfig, TrainConfig
from rlhf_ppo.algorithms import GRPO, RLOO, TRPO, PPOClip, PPOPenalty, Reinforce
from rlhf_ppo.loop.run_folder import RunFolder
from rlhf_ppo.rewards.failures import RewardFailures
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.utils.field_types import check_fields
from tests.fuzz.harness import Target

KINDS: list[Any] = [PPOConfig, TrainConfig, SamplingConfig, RewardFailures]
ALGORITHMS: list[Any] = [PPOClip, PPOPenalty, TRPO, Reinforce, RLOO, GRPO]

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 300), st.floats(), st.text(max_size=6),
    st.sampled_from([math.nan, math.inf, -math.inf, 10**400, 2**63, -1, 0, 1e-320, "kl", "{}", "{", "null", "[1]"]),
)  # fmt: skip
values = st.one_of(
    scalars, scalars, st.lists(scalars, max_size=3), st.lists(scalars, max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=4), scalars, max_size=2), st.just(object()), st.binary(max_size=4),
    st.just(SamplingConfig(max_new_tokens=4)),
)  # fmt: skip
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)

CONTRACT = json.loads(json.dumps({
    "kind": "single", "format_version": 1, "base": "x", "head": "score.weight",
    "text": {"template": "plain", "append_eos": True, "max_length": 16}, "tokenizer_sha256": "0",
    "normalization": {"gain": 1.0, "bias": 0.0, "reference": "none", "samples": 0}, "members": [], "data": {},
    "metrics": {}, "versions": {},
}))  # fmt: skip


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Any, Any]:
    """(what, of which kind, with what)."""
    what = draw(st.sampled_from(["keywords"] * 6 + ["attribute", "contract", "contract bytes", "run folder"]))
    kind = draw(st.sampled_from(KINDS + ALGORITHMS))
    names = st.sampled_from(
        [item.name for item in fields(kind)] if draw(st.integers(0, 9)) else ["x", "", "learning rate"]
    )
    match what:
        case "keywords":
            settings = draw(st.dictionaries(names, values, min_size=1, max_size=3))
            if kind is TrainConfig:
                settings.setdefault("sampling", SamplingConfig(max_new_tokens=4))
            if kind is SamplingConfig:
                settings.setdefault("max_new_tokens", 4)
            return what, kind, settings
        case "attribute":
            return what, PPOConfig, draw(st.dictionaries(names, values, min_size=1, max_size=1))
        case "contract":
            changed = dict(CONTRACT)
            for _ in range(draw(st.integers(1, 2))):
                part = draw(st.sampled_from([None, "text", "normalization"]))
                inner = changed if part is None or not isinstance(changed.get(part), dict) else dict(changed[part])
                key = draw(st.sampled_from(list(inner) + ["other"])) if inner else "other"
                if draw(st.booleans()):
                    inner[key] = draw(trees)
                else:
                    inner.pop(key, None)
                changed = inner if part is None or inner is changed else changed | {part: inner}
            return what, None, json.dumps(changed).encode()
        case "contract bytes" | "run folder":
            text = json.dumps(draw(trees)).encode()
            cut = draw(st.integers(0, len(text)))
            return what, None, draw(st.sampled_from([text, text[:cut], text[:cut] + draw(st.binary(max_size=3))]))
    raise AssertionError(what)


def target(folder: Path) -> Target:
    """Every configuration and every settings file that is read."""

    def attempt(case: tuple[str, Any, Any]) -> None:
        what, kind, content = case
        match what:
            case "keywords":
                if not set(content) <= {item.name for item in fields(kind)}:
                    raise ValueError("a dataclass names an unknown keyword itself")
                check_fields(kind(**content))
            case "attribute":
                config = PPOConfig()
                for name, value in content.items():
                    try:
                        setattr(config, name, value)
                    except AttributeError as error:
                        raise ValueError(f"{error}") from error
            case "contract" | "contract bytes":
                (folder / CONTRACT_FILE).write_bytes(content)
                Contract.read(folder)
            case "run folder":
                for name in ("config.json", "metrics.jsonl", "evaluation.json", "samples.jsonl", "tokens.jsonl"):
                    (folder / name).write_bytes(content)
                run = RunFolder.open(folder)
                for read in (run.config, run.metrics, run.evaluation, run.samples, run.tokens, run.unreadable_lines):
                    read()

    return Target(cases=cases(), attempt=attempt)
