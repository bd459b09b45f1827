"""The state of one environment as JSON, so that a resumed run plays on in the middle of an episode."""

from collections.abc import Iterator
from typing import Any

import mujoco
import numpy as np

from rlhf_ppo.control.randomization import DomainRandomization


def snapshot(env: Any) -> dict[str, Any]:
    """Random state, time limit, world, and physics or attributes of an environment."""
    base = env.unwrapped
    state: dict[str, Any] = {
        "rng": base.np_random.bit_generator.state,
        "elapsed": [layer._elapsed_steps for layer in _layers(env) if hasattr(layer, "_elapsed_steps")],
        "worlds": [layer.state_dict() for layer in _layers(env) if isinstance(layer, DomainRandomization)],
    }
    if isinstance(getattr(base, "model", None), mujoco.MjModel):
        derived = {name: getattr(base.data, name).tolist() for name in _DERIVED}
        return state | {"physics": _physics(base).tolist(), "derived": derived}
    return state | {"attributes": {name: _plain(value) for name, value in vars(base).items() if _is_plain(value)}}


def restored(env: Any, state: dict[str, Any]) -> None:
    """Bring an environment of the same kind, reset before, to a `snapshot`."""
    base = env.unwrapped
    base.np_random.bit_generator.state = state["rng"]
    limits = [layer for layer in _layers(env) if hasattr(layer, "_elapsed_steps")]
    for layer, elapsed in zip(limits, state["elapsed"], strict=True):
        layer._elapsed_steps = elapsed
    worlds = [layer for layer in _layers(env) if isinstance(layer, DomainRandomization)]
    for layer, saved in zip(worlds, state["worlds"], strict=True):
        layer.load_state_dict(saved)
    if "physics" in state:
        mujoco.mj_setState(base.model, base.data, np.asarray(state["physics"]), _INTEGRATION)
        for name, values in state["derived"].items():
            target = getattr(base.data, name)
            target[...] = np.reshape(values, target.shape)
    for name, value in state.get("attributes", {}).items():
        setattr(base, name, np.asarray(value["array"], value["dtype"]) if isinstance(value, dict) else value)


_INTEGRATION = mujoco.mjtState.mjSTATE_INTEGRATION
_DERIVED = ("xpos", "xipos", "site_xpos", "cinert", "cvel", "cfrc_ext", "qfrc_actuator", "qfrc_constraint")
"""What rewards and observations of Gymnasium's tasks read before a step computes it anew; it lags behind the state."""


def _physics(base: Any) -> np.ndarray:
    values = np.empty(mujoco.mj_stateSize(base.model, _INTEGRATION))
    mujoco.mj_getState(base.model, base.data, values, _INTEGRATION)
    return values


def _layers(env: Any) -> Iterator[Any]:
    while True:
        yield env
        if env is env.unwrapped:
            return
        env = env.env


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, np.ndarray, np.floating, np.integer))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    return value.item() if isinstance(value, np.generic) else value
