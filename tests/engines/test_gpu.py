"""On a CUDA device: every way to draw gives the own loop's responses on a CPU, and a PPO step takes the CPU's step.

python -m pytest -m gpu tests/engines/test_gpu.py
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf_ppo.kernels.fused_modules import FusedModule
from rlhf_ppo.kernels.liger_layers import use_liger_layers
from rlhf_ppo.kernels.triton_logprobs import choose_fold, fold_block
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from rlhf_ppo.samplers.make_sampler import SamplerName, make_sampler
from tests.support.tiny_models import VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # inductor's, for generate-static in float32
]

PROMPTS = [torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([11] * 9)]
GREEDY = SamplingConfig(max_new_tokens=12, stop_token_ids=tuple(range(0, VOCAB_SIZE, 9)), do_sample=False)


@pytest.fixture(autouse=True)
def _on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests keep Accelerate on the CPU."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


def on_gpu(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.cuda() for tensor in tensors]


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("name", ["loop", "generate", "generate-static", "continuous"])
def test_greedy_responses_are_those_of_the_cpu(name: SamplerName, build: Callable[[], Any]) -> None:
    model = build()
    expected = DecodeLoop()(copy.deepcopy(model), PROMPTS, GREEDY)
    found = make_sampler(name)(model.cuda(), on_gpu(PROMPTS), GREEDY)
    assert [row.tolist() for row in found.responses] == [row.tolist() for row in expected.responses]
    assert found.finished == expected.finished


@pytest.mark.parametrize("name", ["loop", "continuous"])
def test_log_probabilities_are_those_of_the_model(name: SamplerName) -> None:
    model = tiny_llama().cuda()
    samples = make_sampler(name)(model, on_gpu(PROMPTS), replace(GREEDY, do_sample=True, num_return_sequences=4))
    assert samples.logprobs is not None
    for prompt, response, logprobs in zip(samples.prompts, samples.responses, samples.logprobs, strict=True):
        ids = torch.cat([prompt.cuda(), response.cuda()])
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].double()
        truth = logits.log_softmax(-1).gather(-1, response.cuda()[:, None])[:, 0]
        assert_close(logprobs.double().cuda(), truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"fused_head": False}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_a_step_is_that_of_the_cpu(build: Callable[[], Any], settings: dict[str, Any]) -> None:
    responses = [torch.tensor([8, 9, 10]), torch.tensor([11]), torch.tensor([12, 13, 14, 15, 16])]
    scores = [torch.tensor(score) for score in (1.0, -1.0, 0.5)]
    before, after = [], []
    for cpu in (True, False):
        torch.manual_seed(0)  # the value head is drawn
        model = AutoModelForCausalLMWithValueHead.from_pretrained(build())
        before.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        sizes: dict[str, Any] = {"batch_size": 3, "mini_batch_size": 3, "ppo_epochs": 2, "learning_rate": 1e-3}
        exact: dict[str, Any] = {"precision": "float32", "diagnose": False, "accelerator_kwargs": {"cpu": cpu}}
        config = PPOConfig(**sizes, **settings, **exact)
        trainer = PPOTrainer(config, model, tokenizer=tiny_tokenizer())
        device = trainer.current_device
        assert device.type == ("cpu" if cpu else "cuda")
        trainer.step([p.to(device) for p in PROMPTS], [r.to(device) for r in responses], [s.to(device) for s in scores])
        after.append(torch.cat([p.detach().cpu().flatten() for p in trainer.model.parameters()]))
        type(trainer.accelerator.state)._reset_state(reset_partial_state=True)
    assert torch.equal(before[0], before[1])
    moved, apart = (after[0] - before[0]).norm(), (after[1] - after[0]).norm()
    assert moved > 0
    assert apart <= 0.02 * moved


def test_triton_kernels_are_right_at_the_head_and_in_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("triton", "liger_kernel"):
        pytest.importorskip(package)
    monkeypatch.setenv("RLHF_PPO_GPU_KERNELS", "triton")
    model: Any = tiny_llama().cuda()
    assert choose_fold(model.device, 5000, torch.bfloat16) is fold_block
    ids, found = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]], device="cuda"), []
    for _ in range(2):
        states = model.model(ids).last_hidden_state
        found.append((states, *torch.autograd.grad(states.cos().sum(), list(model.model.parameters()))))
        use_liger_layers(model, model.device, torch.bfloat16)
    assert sum(isinstance(module, FusedModule) for module in model.modules()) == 9
    assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
