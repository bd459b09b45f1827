"""FSDP2 is set up as it can be used, or refused with the reason; trees are made whole and cut again."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from rlhf_ppo.distributed.fsdp import enable_fsdp2_on_cpu, gather_nested_tensors, shard_like


def accelerator(plugin: FullyShardedDataParallelPlugin, device: str = "cpu") -> Accelerator:
    """What is looked at of an Accelerator that has kept its plugin."""
    made: Any = object.__new__(Accelerator)
    made.state = SimpleNamespace(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin, device=torch.device(device))
    found: Accelerator = made
    return found


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"fsdp_version": 1}, "expected fsdp_version 2, got 1"),
        ({"fsdp_version": 2, "cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading is on"),
        ({"fsdp_version": 2, "cpu_offload": True}, "there is none"),
    ],
)
def test_fsdp_that_cannot_be_used_here_is_refused(
    settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    plugin = FullyShardedDataParallelPlugin(**{"cpu_ram_efficient_loading": False, **settings})
    with pytest.raises(ValueError, match=reason):
        enable_fsdp2_on_cpu(accelerator(plugin), None)


def test_offload_is_left_to_machines_with_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True, cpu_ram_efficient_loading=False)
    enable_fsdp2_on_cpu(accelerator(plugin, device="cuda"), None)


def test_without_fsdp_a_tree_is_left_as_it_is() -> None:
    tree = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}, "groups": [{"betas": (0.9, 0.95)}]}
    assert gather_nested_tensors(tree, keep=True) == tree
    assert shard_like(tree["state"], torch.ones(2)) is tree["state"]
