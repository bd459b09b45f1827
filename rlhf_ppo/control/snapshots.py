"""Save and restore the state of an environment as JSON, so that a resumed run continues in mid-episode."""

from collections.abc import Iterator
from typing import Any

import mujoco
import numpy as np

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
    return state | {
        "attributes": {name: _to_json(value) for name, value in vars(base).items() if _is_serializable(value)}
    }


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
        setattr(base, name, np.asarray(value["array"], value["dtype"]) if isinstance(value, dict) else value)


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


def _is_serializable(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, np.ndarray, np.floating, np.integer))


def _to_json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    return value.item() if isinstance(value, np.generic) else value
