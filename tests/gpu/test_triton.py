"""Steps on a GPU by Triton kernels where they pass their trials; definitions stand in for them."""

from typing import Any

import pytest
import torch
from peft import LoraConfig

from rlhf_ppo.kernels import liger_layers, triton_logprobs, varlen_attention
from rlhf_ppo.kernels.fused_modules import FusedModule
from rlhf_ppo.kernels.triton_logprobs import choose_fold, fold_block
from tests.gpu.runs import batch, trainer, weights
from tests.kernels.test_gpu_trial import set_clock
from tests.kernels.test_liger_layers import STANDINS
from tests.kernels.test_triton_logprobs import Definition
from tests.kernels.test_varlen_attention import reference
from tests.support.pretend_cuda import Counts

WAYS: dict[str, dict[str, Any]] = {
    "packed": {},
    "recomputed": {"gradient_checkpointing": True},
    "adapter": {"peft": LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "gate_proj"])},
}


def fused(model: torch.nn.Module) -> list[str]:
    return sorted({type(module).__name__ for module in model.modules() if isinstance(module, FusedModule)})


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_that_of_torchs_own_kernels(way: str, gpu: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen_attention, "kernel", lambda: reference)
    monkeypatch.setattr(liger_layers, "TRIAL_TOKENS", 8)
    monkeypatch.setattr(liger_layers, "_TRIALS", {})
    set_clock(monkeypatch, plain=2.0, kernel=1.0)
    found, waits = [], []
    for functions, kernel in ({}, None), (STANDINS, Definition()):
        choose_fold.cache_clear()
        monkeypatch.setattr(liger_layers, "liger_function", functions.get)
        monkeypatch.setattr(triton_logprobs, "kernel", lambda kernel=kernel: kernel)
        made = trainer(diagnose=False, **WAYS[way])
        before = weights(made)
        made.step(*batch())
        gpu.reset()
        found.append(weights(made) - before)
        made.step(*batch())
        waits.append(sum(gpu.syncs.values()))
        kinds = fused(made.model)
        assert kinds == (["FusedLlamaAttention", "FusedLlamaMLP", "FusedLlamaRMSNorm"] if functions else [])
        if made.ref_model is not None:
            assert fused(made.ref_model) == kinds
    assert choose_fold(torch.device("cuda:0"), made.model.config.vocab_size, torch.bfloat16) is fold_block
    choose_fold.cache_clear()
    assert waits[1] == waits[0]
    plain, ours = found
    assert (ours - plain).norm() <= 0.5 * plain.norm()  # Adam's first step, of bfloat16's rounding
    assert torch.nn.functional.cosine_similarity(ours, plain, dim=0) > 0.9
