"""What DeepSpeed needs beyond its launch file where there is no GPU; the engine: tests/distributed/test_zero.py."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.utils import InitProcessGroupKwargs

from rlhf_ppo.distributed import deepspeed


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the library, on a machine without a GPU, in a process that is not connected to others yet."""
    library: Any = ModuleType("deepspeed")
    library.__spec__ = ModuleSpec("deepspeed", None)
    library.ops = SimpleNamespace(__compatible_ops__={"deepspeed_shm_comm": True})
    monkeypatch.setitem(sys.modules, "deepspeed", library)
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    return library


def test_deepspeed_on_a_cpu_gets_a_backend_and_compiles_nothing(engine: Any) -> None:
    given = {"mixed_precision": "bf16"}
    found = deepspeed.accelerator_arguments(given)
    assert found["mixed_precision"] == "bf16" and given == {"mixed_precision": "bf16"}
    assert [handler.backend for handler in found["kwargs_handlers"]] == ["gloo"]
    assert engine.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_a_handler_of_the_users_own_stays(engine: Any) -> None:
    own = InitProcessGroupKwargs(backend="mpi")
    assert deepspeed.accelerator_arguments({"kwargs_handlers": [own]})["kwargs_handlers"] == [own]


def test_deepspeed_and_the_order_to_use_the_cpu_are_refused_together(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="Accelerate would silently drop DeepSpeed"):
        deepspeed.accelerator_arguments({})


def test_nothing_is_added_with_a_gpu_without_deepspeed_or_once_the_processes_are_connected(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PartialState, "_shared_state", {"backend": "gloo"})
    assert deepspeed.accelerator_arguments({}) == {}
    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert deepspeed.accelerator_arguments({}) == {}
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr("rlhf_ppo.distributed.deepspeed.find_spec", lambda name: None)
    assert deepspeed.accelerator_arguments({}) == {}
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    assert deepspeed.accelerator_arguments({}) == {}
