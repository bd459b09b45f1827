"""Who computes matrix products on a CPU, and what `RLHF_PPO_MATMUL` makes of it."""

import pytest
import torch

from rlhf_ppo.kernels import matmul, packed_weights


def test_no_trial_moves_the_random_stream_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a resumed run would go on with other random numbers than an uninterrupted one."""
    monkeypatch.delenv("RLHF_PPO_MATMUL", raising=False)
    before = torch.get_rng_state()
    matmul.onednn_is_faster.__wrapped__()
    matmul.bfloat16_is_faster.__wrapped__()
    for dtype in (torch.float32, torch.bfloat16):
        packed_weights.packing_is_faster.__wrapped__(dtype)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("words", "onednn", "low"),
    [
        ("torch", False, None),
        ("onednn", True, None),
        ("bfloat16", None, True),
        (" OneDNN,float32", True, False),
        ("", None, None),
    ],
)
def test_the_environment_can_force_the_products(
    words: str, onednn: bool | None, low: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_PPO_MATMUL", words)
    for choice, forced, is_faster in zip(
        matmul.CHOICES, (onednn, low), (matmul.onednn_is_faster, matmul.bfloat16_is_faster), strict=True
    ):
        assert matmul.choice_from_environment(choice) is forced
        if forced is not None:
            assert is_faster.__wrapped__() is forced


@pytest.mark.parametrize("words", ["mkl", "onednn,torch", "torch,bf16"])
def test_products_that_the_environment_misspells_are_refused(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_PPO_MATMUL", words)
    with pytest.raises(ValueError, match=r"RLHF_PPO_MATMUL=.* cannot be read: it takes one of 'torch' and 'onednn'"):
        matmul.onednn_is_faster.__wrapped__()


def test_onednn_that_is_not_there_cannot_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_PPO_MATMUL", "onednn")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="carries no linear kernel of: say 'torch'"):
        matmul.onednn_is_faster.__wrapped__()
