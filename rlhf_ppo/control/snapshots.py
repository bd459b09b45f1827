"""Save and restore the state of an environment as JSON, so that a resumed run continues in mid-episode."""

import warnings
from collections import deque
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import mujoco
import numpy as np
from gymnasium import Space
from gymnasium.envs.registration import EnvSpec

from rlhf_ppo.control.randomization import DomainRandomization


def snapshot(env: Any) -> dict[str, Any]:
    """Random state, elapsed steps, randomization, and physics or attributes of an environment."""
    base = env.unwrapped
    state: dict[str, Any] = {
        "rng": base.np_random.bit_generator.state,
        "elapsed": [layer._elapsed_steps for layer in _wrapper_chain(env) if hasattr(layer, "_elapsed_steps")],
        "worlds": [layer.state_dict() for layer in _wrapper_chain(env) if isinstance(layer, DomainRandomization)],
    }
    if isinstance(getattr(base, "model", None), mujoco.MjModel):
        derived = {name: getattr(base.data, name).tolist() for name in _DERIVED}
        return state | {"physics": _physics_state(base).tolist(), "derived": derived}
    attributes, unsaved = {}, []
    for name, value in vars(base).items():
        try:
            attributes[name] = _to_json(value)
        except TypeError:
            if not isinstance(value, _STATELESS) and value is not base.np_random:
                unsaved.append(name)
    if unsaved:
        warnings.warn(
            f"The state of {base} in {', '.join(unsaved)} cannot be saved, as it is not made of numbers, texts and "
            "arrays: a run that resumes from this checkpoint differs from an uninterrupted one if it changes within "
            "an episode.", stacklevel=2,
        )  # fmt: skip
    return state | {"attributes": attributes}


def restore_snapshot(env: Any, state: dict[str, Any]) -> None:
    """Restore a `snapshot` in an environment of the same kind that has been reset."""
    base = env.unwrapped
    base.np_random.bit_generator.state = state["rng"]
    limits = [layer for layer in _wrapper_chain(env) if hasattr(layer, "_elapsed_steps")]
    for layer, elapsed in zip(limits, state["elapsed"], strict=True):
        layer._elapsed_steps = elapsed
    worlds = [layer for layer in _wrapper_chain(env) if isinstance(layer, DomainRandomization)]
    for layer, saved in zip(worlds, state["worlds"], strict=True):
        layer.load_state_dict(saved)
    if "physics" in state:
        mujoco.mj_setState(base.model, base.data, np.asarray(state["physics"]), _STATE_SPEC)
        for name, values in state["derived"].items():
            target = getattr(base.data, name)
            target[...] = np.reshape(values, target.shape)
    for name, value in state.get("attributes", {}).items():
        setattr(base, name, _from_json(value))


_STATELESS = (Space, EnvSpec, FunctionType, MethodType, ModuleType, type)
_STATE_SPEC = mujoco.mjtState.mjSTATE_INTEGRATION
_DERIVED = ("xpos", "xipos", "site_xpos", "cinert", "cvel", "cfrc_ext", "qfrc_actuator", "qfrc_constraint")
"""Derived quantities that Gymnasium's rewards and observations read before a step recomputes them."""


def _physics_state(base: Any) -> np.ndarray:
    values = np.empty(mujoco.mj_stateSize(base.model, _STATE_SPEC))
    mujoco.mj_getState(base.model, base.data, values, _STATE_SPEC)
    return values


def _wrapper_chain(env: Any) -> Iterator[Any]:
    while True:
        yield env
        if env is env.unwrapped:
            return
        env = env.env


def _to_json(value: Any) -> Any:
    """A value as JSON, with its types; a TypeError for anything but numbers, texts, arrays and collections of them."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufU":
        return {"array" if isinstance(value, np.ndarray) else "scalar": value.tolist(), "dtype": str(value.dtype)}
    if type(value) in (list, tuple, set, deque):
        return {type(value).__name__: [_to_json(part) for part in value]} | _length_limit(value)
    if type(value) is dict:
        return {"dict": [[_to_json(name), _to_json(part)] for name, part in value.items()]}
    raise TypeError(type(value))


def _length_limit(value: Any) -> dict[str, int]:
    return {"maxlen": value.maxlen} if isinstance(value, deque) and value.maxlen is not None else {}


def _from_json(value: Any) -> Any:
    """The value of `_to_json`."""
    match value:
        case {"array": numbers, "dtype": dtype}:
            return np.asarray(numbers, dtype)
        case {"scalar": number, "dtype": dtype}:
            return np.dtype(dtype).type(number)
        case {"list": parts}:
            return [_from_json(part) for part in parts]
        case {"tuple": parts}:
            return tuple(_from_json(part) for part in parts)
        case {"set": parts}:
            return {_from_json(part) for part in parts}
        case {"deque": parts}:
            return deque((_from_json(part) for part in parts), value.get("maxlen"))
        case {"dict": items}:
            return {_from_json(name): _from_json(part) for name, part in items}
        case _:
            return value
