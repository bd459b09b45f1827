"""On a pretended GPU no tensor of the CPU meets one of the device, whichever way a user takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from torch.testing import assert_close

from rlhf_ppo import GRPO, RLOO, TRPO, TrainConfig
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from rlhf_ppo.samplers.make_sampler import make_sampler
from tests.gpu.runs import batch, trainer, weights
from tests.support.pretend_cuda import Counts, DeviceMixError
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer
from tests.support.tiny_run import TEXTS, share_of_e

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def test_the_pretended_device_refuses_a_mix_and_counts_a_wait(gpu: Counts) -> None:
    on_gpu = torch.ones(3, device="cuda")
    with pytest.raises(DeviceMixError, match="same device"):
        on_gpu + torch.ones(3)
    assert_close((on_gpu + torch.tensor(1.0)).cpu(), torch.full((3,), 2.0))
    float(on_gpu.sum()), on_gpu.nonzero(), on_gpu[on_gpu > 0]
    assert sum(gpu.syncs.values()) == 4  # with the copy to the CPU
    assert sum(gpu.uploads.values()) == 0


@pytest.mark.parametrize("build", [tiny_llama, pytest.param(tiny_gpt2, marks=pytest.mark.slow)])
def test_a_step_is_that_of_the_cpu(gpu: Counts, build: Callable[[], Any]) -> None:
    """GPT-2's key biases move by rounding alone: their gradient is 0, and Adam steps by its sign."""
    on_gpu = trainer(build(), precision="float32")
    before = weights(on_gpu)
    on_gpu.step(*batch())
    AcceleratorState._reset_state(True)
    on_cpu = trainer(build(), accelerator_kwargs={"cpu": True})
    on_cpu.step(*batch(on_device=False))
    assert on_cpu.current_device.type == "cpu"
    assert not torch.equal(weights(on_gpu), before)
    assert (weights(on_gpu) - weights(on_cpu)).norm() <= 2e-2 * (weights(on_cpu) - before).norm()


@pytest.mark.parametrize("settings", [
    pytest.param(
        {"token_budget": 12, "max_grad_norm": 0.5, "kl_penalty": "full", "reference_placement": "offloaded"}
        | {"use_score_scaling": True, "score_clip": 1.0, "whiten_rewards": True, "early_stopping": True}
        | {"ent_coef": 0.1},
        marks=pytest.mark.slow,
    ),
    {"gradient_checkpointing": True, "kl_penalty": "k3", "kl_placement": "loss", "optimizer": "adam_tensorflow"}
    | {"fused_head": False, "diagnose": False, "accelerator_kwargs": {"mixed_precision": "bf16"}},
], ids=["offloaded, full KL", "checkpointing, KL in the loss"])  # fmt: skip
def test_a_step_mixes_no_devices(gpu: Counts, settings: dict[str, Any]) -> None:
    made = trainer(**settings)
    before = weights(made)
    made.step(*batch())
    assert not torch.equal(weights(made), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm", [TRPO(), GRPO(), pytest.param(RLOO(), marks=pytest.mark.slow)], ids=lambda made: type(made).__name__
)
def test_other_algorithms_mix_no_devices(gpu: Counts, algorithm: Any) -> None:
    made = trainer(tiny_gpt2(), algorithm=algorithm)
    tokenizer, sampling = tiny_tokenizer(), SamplingConfig(max_new_tokens=4, num_return_sequences=2)
    prompts = PromptDataset.from_texts(TEXTS, tokenizer)
    state = made.train(share_of_e, TrainConfig(iterations=1, sampling=sampling, progress=False), prompts=prompts)
    assert state.metrics["ppo/updates"] >= 1


@pytest.mark.slow
def test_lora_and_encoder_decoders_mix_no_devices(gpu: Counts) -> None:
    for made in (trainer(peft=LORA), trainer(tiny_t5())):
        before = weights(made)
        made.step(*batch())
        assert not torch.equal(weights(made), before)


@pytest.mark.parametrize("name", ["loop", "generate"])
def test_samplers_draw_the_cpu_s_responses(gpu: Counts, name: str) -> None:
    """Several responses to a prompt, stop tokens, unequal prompts: rows are repeated, and rows leave."""
    prompts = [torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([11] * 9)]
    sampling = SamplingConfig(max_new_tokens=8, stop_token_ids=tuple(range(0, 320, 9)), do_sample=False)
    expected = DecodeLoop()(tiny_llama(), prompts, sampling)
    found = make_sampler(name)(tiny_llama().cuda(), [prompt.cuda() for prompt in prompts], sampling)
    assert [row.tolist() for row in found.responses] == [row.tolist() for row in expected.responses]
    assert found.finished == expected.finished


@pytest.mark.slow
def test_a_run_trains_evaluates_saves_and_resumes(gpu: Counts, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    prompts = PromptDataset.from_texts(TEXTS, tokenizer)
    sampling = SamplingConfig(max_new_tokens=6, stop_token_ids=(EOS_TOKEN_ID,))
    settings = {"sampling": sampling, "progress": False, "output_dir": str(tmp_path), "eval_every": 1, "save_every": 1}
    for iterations in (1, 2):
        made = trainer(tiny_gpt2())
        state = made.train(
            share_of_e, TrainConfig(iterations=iterations, **settings), prompts=prompts, eval_prompts=prompts
        )
    assert state.iteration == 2
    made.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "config.json").exists()
