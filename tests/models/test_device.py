"""A model beside the policy goes to the GPU of its own process."""

import pytest
import torch

from rlhf_ppo.models.device import default_device


@pytest.mark.parametrize(("local_rank", "expected"), [("3", "cuda:3"), (None, "cuda:0")])
def test_each_process_of_a_launcher_uses_its_own_gpu(
    local_rank: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert default_device() == torch.device(expected)


def test_without_a_gpu_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cpu")
