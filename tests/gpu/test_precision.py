"""Which dtype every matrix product has on a pretended GPU, by the one precision policy."""

from typing import Any

import pytest
import torch
from peft import LoraConfig

from rlhf_ppo import TRPO, TrainConfig
from rlhf_ppo.models.precision import choose_precision
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from tests.gpu.runs import batch, trainer, weights
from tests.support.pretend_cuda import Counts, pretend_cuda
from tests.support.tiny_models import tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer
from tests.support.tiny_run import TEXTS, share_of_e

HALF, SINGLE = torch.bfloat16, torch.float32


def operands(gpu: Counts) -> dict[torch.dtype, int]:
    """Number of linear layers' products by the dtype of their operands."""
    found: dict[torch.dtype, int] = {}
    for (name, dtype, _), count in gpu.products.items():
        if name in ("mm", "addmm"):  # positions are multiplied in float32 by `bmm`
            found[dtype] = found.get(dtype, 0) + count
    return found


@pytest.mark.parametrize(
    "settings", [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in ({"precision": "bf16"}, {"bf16": True}))]
)
def test_layers_and_head_multiply_in_bfloat16_and_the_head_s_results_are_float32(
    gpu: Counts, settings: dict[str, Any]
) -> None:
    """Left in float32 are the value head's products, a handful a pass: two layers have 14 forward alone."""
    made = trainer(diagnose=False, **settings)
    assert made.accelerator.mixed_precision == "bf16"
    made.step(*batch())
    gpu.reset()
    made.step(*batch())
    found = operands(gpu)
    assert found[HALF] > 60
    assert found.get(SINGLE, 0) <= 5
    heads = sum(count for (_, dtype, result), count in gpu.products.items() if (dtype, result) == (HALF, SINGLE))
    assert heads == 5  # scoring by policy and reference, and logits and two gradients of the update
    assert {parameter.dtype for parameter in made.model.parameters()} == {SINGLE}
    assert {gradient.dtype for state in made.optimizer.state.values() for gradient in state.values()} == {SINGLE}


def test_the_reference_s_layers_are_bfloat16_and_start_equal_to_the_policy(gpu: Counts) -> None:
    made = trainer(tiny_gpt2(), diagnose=False)
    reference = made.ref_model.pretrained_model
    assert reference.transformer.h[0].mlp.c_fc.weight.dtype == HALF
    assert reference.transformer.wte.weight.dtype == SINGLE
    statistics = made.step(*batch())
    assert statistics["objective/kl"] == 0.0
    ids = torch.tensor([[5, 6, 7]], device="cuda")
    assert reference(input_ids=ids).logits.shape == (1, 3, 320)  # a call of one's own runs, too


def test_layers_that_the_reference_shares_stay_float32_in_the_policy(gpu: Counts) -> None:
    made = trainer(tiny_gpt2(), diagnose=False, shared=1)
    assert {weight.dtype for weight in made.model.parameters()} == {SINGLE}
    assert made.ref_model.pretrained_model.transformer.h[1].mlp.c_fc.weight.dtype == HALF
    ids = torch.tensor([[5, 6, 7]], device="cuda")
    assert made.model.pretrained_model(input_ids=ids).logits.dtype == SINGLE  # a call outside of autocast
    assert made.step(*batch())["objective/kl"] == 0.0


@pytest.mark.parametrize("settings", [{"precision": "float32"}, {"accelerator_kwargs": {"mixed_precision": "no"}}])
def test_float32_is_float32_everywhere(gpu: Counts, settings: dict[str, Any]) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    made = trainer(diagnose=False, **settings)
    gpu.reset()
    made.step(*batch())
    assert set(operands(gpu)) - {torch.float64} == {SINGLE}
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.slow
def test_a_trust_region_stays_in_float32_unless_asked(gpu: Counts) -> None:
    """Its KL of 0.01 nats is below bfloat16's rounding."""
    assert trainer(tiny_gpt2(), algorithm=TRPO()).precision.compute == SINGLE
    with pytest.raises(ValueError, match="float32 products"):
        trainer(tiny_gpt2(), algorithm=TRPO(), precision="bf16")


@pytest.mark.slow
def test_rollouts_multiply_as_scoring_does(gpu: Counts) -> None:
    made = trainer(tiny_llama(), diagnose=False)
    gpu.reset()  # fast paths are proved in float32
    prompts = PromptDataset.from_texts(TEXTS, tiny_tokenizer())
    sampling = SamplingConfig(max_new_tokens=12, num_return_sequences=2)
    state = made.train(share_of_e, TrainConfig(iterations=1, sampling=sampling, progress=False), prompts=prompts)
    assert operands(gpu)[HALF] > 10 * operands(gpu).get(SINGLE, 0)  # the value head's
    assert state.metrics["sampler/logprob_difference"] < 0.05


@pytest.mark.slow
def test_weights_loaded_in_bfloat16_get_float32_masters_and_move(gpu: Counts) -> None:
    """At a learning rate of 1e-5 a step is far below the distance of two bfloat16 numbers near 0.2."""
    made = trainer(tiny_llama(dtype=HALF), learning_rate=1e-5, diagnose=False)
    before = weights(made)
    statistics = made.step(*batch())
    assert statistics["objective/kl"] == 0.0
    assert (weights(made) != before).float().mean() > 0.7
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base = trainer(tiny_llama(dtype=HALF), peft=lora, diagnose=False).model.pretrained_model
    assert {weight.dtype for weight in base.parameters() if not weight.requires_grad} == {HALF}  # they need not move


@pytest.mark.slow
def test_an_encoder_decoder_multiplies_in_bfloat16(gpu: Counts) -> None:
    made = trainer(tiny_t5(), diagnose=False)
    gpu.reset()
    made.step(*batch())
    assert operands(gpu)[HALF] > 20 * operands(gpu).get(SINGLE, 0)


def test_a_card_without_bfloat16_gets_float16_and_a_request_for_emulated_bfloat16_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    with pretend_cuda(capability=(7, 5)):
        precision = choose_precision("auto", torch.device("cuda"))
        assert (precision.compute, precision.autocast) == (torch.float16, torch.float16)
        with pytest.raises(ValueError, match=r"compute capability 8\.0.*precision='auto'"):
            trainer(precision="bf16")


def test_settings_that_contradict_each_other_are_named() -> None:
    with pytest.raises(ValueError, match="precision='float32' and bf16=True"):
        trainer(precision="float32", bf16=True)


def test_one_line_says_what_computes_in_which_dtype(gpu: Counts) -> None:
    line = str(trainer(diagnose=False).precision)
    assert line == (
        "precision: trained weights in float32, products in bfloat16, reference in bfloat16, float32 products in TF32"
    )
