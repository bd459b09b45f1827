"""TRPO keeps its promises on a tiny language model: the right curvature, the KL bound, and a way back."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig
from torch import Tensor
from torch.testing import assert_close

from rlhf_ppo import TRPO, AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf_ppo.batch import TokenInputs, TrainBatch, pad_rows
from rlhf_ppo.functional import flatten
from rlhf_ppo.updates import TrustRegionUpdate
from rlhf_ppo.updates.trust_region_config import check_processes
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

VOCAB = 7


def trainer(algorithm: TRPO, *, dtype: torch.dtype = torch.float32, lora: bool = False, **settings: Any) -> PPOTrainer:
    base = tiny_gpt2(vocab_size=VOCAB, n_layer=1, n_embd=4, n_head=2, n_positions=16, dtype=dtype)
    adapters = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM") if lora else None
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=adapters)
    defaults: dict[str, Any] = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 3, "learning_rate": 0.05}
    return PPOTrainer(PPOConfig(**defaults | settings), model, tokenizer=tiny_tokenizer(), algorithm=algorithm)


def batch(own: PPOTrainer, *, rows: int = 8, scale: float = 1.0) -> TrainBatch:
    """Ragged random responses with random advantages, one of their tokens written by somebody else."""
    generator = torch.Generator().manual_seed(1)
    lengths = [1 + row % 4 for row in range(rows)]
    responses = [torch.randint(2, VOCAB, (length,), generator=generator) for length in lengths]
    inputs = TokenInputs(prompts=[torch.tensor([3, 2 + row % 3]) for row in range(rows)], responses=responses)
    mask = pad_rows([torch.ones(length) for length in lengths]).bool()
    mask[3, 1] = False
    scored = own.scorer(inputs)
    advantages, returns = (torch.randn(mask.shape, generator=generator) * mask * scale for _ in range(2))
    return TrainBatch(
        inputs=inputs, mask=mask, logprobs=scored.logprobs, values=scored.values[:, :-1], advantages=advantages,
        returns=returns,
    )  # fmt: skip


def update_of(own: PPOTrainer) -> TrustRegionUpdate:
    assert isinstance(own.algorithm.update, TrustRegionUpdate)
    return own.algorithm.update


def logits(update: TrustRegionUpdate, inputs: TokenInputs, mask: Tensor) -> Tensor:
    """Of our tokens alone, by the plain model."""
    model: Any = update.policy.model
    rows = []
    for row, (prompt, response) in enumerate(zip(inputs.prompts, inputs.responses, strict=True)):
        output = model.pretrained_model(torch.cat([prompt, response])[None], attn_implementation="eager").logits[0]
        rows.append(output[len(prompt) - 1 : -1][mask[row, : len(response)]])
    return torch.cat(rows)


@pytest.mark.parametrize("chunk", [1024, 8])
def test_fisher_products_are_those_of_the_dense_fisher_matrix(chunk: int) -> None:
    """F = mean over our tokens of Jᵀ (diag(p) - p pᵀ) J, in one piece with a kept graph or in many."""
    own = trainer(TRPO(damping=0.1), logits_chunk_size=chunk)
    update, data = update_of(own), batch(own)
    product = update.fisher_product(data, torch.arange(8))
    own.model.pretrained_model.set_attn_implementation("eager")
    outputs = logits(update, data.inputs, data.mask)
    total = torch.zeros(())
    vector = torch.randn(len(flatten(update.parameters)))
    dense = torch.zeros(len(vector), len(vector))
    for row in outputs:
        jacobian = torch.stack(
            [
                flatten(torch.autograd.grad(item, update.parameters, retain_graph=True), like=update.parameters)
                for item in row
            ]
        )
        p = row.softmax(0).detach()
        dense += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
        total += 1
    assert total == data.mask.sum()
    assert_close(product(vector), dense @ vector / total + 0.1 * vector, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("max_kl", [0.001, 0.01, 0.05])
@pytest.mark.parametrize("lora", [False, True])
def test_accepted_steps_stay_in_the_trust_region_and_improve_the_surrogate(max_kl: float, lora: bool) -> None:
    """The KL is measured again here, from the plain model's logits."""
    own = trainer(TRPO(max_kl=max_kl, damping=0.01), lora=lora)
    update, data = update_of(own), batch(own)
    frozen = {name: item.clone() for name, item in own.model.named_parameters() if not item.requires_grad}
    with torch.no_grad():
        before = logits(update, data.inputs, data.mask).log_softmax(-1)
    record = update(data)
    with torch.no_grad():
        after = logits(update, data.inputs, data.mask).log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    assert record.extras["policy/accepted"] == 1.0
    assert record.extras["policy/reached_kl"] == pytest.approx(kl, rel=0.01)
    assert 0.5 * max_kl < kl < 1.5 * max_kl
    assert record.extras["policy/improvement"] > 0
    for name, parameter in own.model.named_parameters():
        assert name not in frozen or torch.equal(frozen[name], parameter)


def test_micro_batches_leave_the_step_alone() -> None:
    steps = []
    for rows in (8, 2):  # conjugate gradients amplify rounding: in float32 to some 4e-4
        sizes = {"mini_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
        own = trainer(TRPO(), dtype=torch.float64, ppo_epochs=1, **sizes)
        update_of(own)(batch(own))
        steps.append(flatten(update_of(own).parameters).detach())
    assert_close(steps[0], steps[1], rtol=0, atol=1e-8)


def test_a_step_that_nothing_accepts_leaves_the_policy_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    own = trainer(TRPO())
    update, data = update_of(own), batch(own)
    before = [parameter.clone() for parameter in update.parameters]
    monkeypatch.setattr(
        update.policy, "kl_from_current",
        lambda pieces: [lambda piece=piece: torch.full((len(piece), piece.width()), 9.0) for piece in pieces],
    )  # fmt: skip
    record = update(data)
    assert record.extras["policy/accepted"] == 0.0
    assert record.extras["policy/backtracks"] == 11.0
    assert record.skipped == 1
    assert all(torch.equal(old, new) for old, new in zip(before, update.parameters, strict=True))


def test_without_advantages_the_policy_stays_and_the_value_head_learns() -> None:
    own = trainer(TRPO())
    update, data = update_of(own), batch(own, scale=1.0)
    still = TrainBatch(**{**vars(data), "advantages": torch.zeros_like(data.advantages)})
    before, head = flatten(update.parameters).clone(), flatten(update.critic.parameters).clone()
    for _ in range(20):
        update(still)
    assert torch.equal(before, flatten(update.parameters))
    assert not torch.equal(head, flatten(update.critic.parameters))
    error = (own.scorer(data.inputs).values[:, :-1] - data.returns)[data.mask].square().mean()
    assert error < 0.9 * (data.values - data.returns)[data.mask].square().mean()


def test_a_gradient_that_is_not_finite_is_skipped_and_reported() -> None:
    own = trainer(TRPO())
    update, data = update_of(own), batch(own, scale=float("inf"))
    before = flatten(update.parameters).clone()
    with pytest.warns(UserWarning, match="the policy did not move"):
        update(TrainBatch(**{**vars(data), "returns": data.values}))
    assert torch.equal(before, flatten(update.parameters))


def test_weights_loaded_in_low_precision_get_float32_masters() -> None:
    """Steps of TRPO are smaller than the rounding of bfloat16."""
    parameters = trainer(TRPO(), dtype=torch.bfloat16).model.parameters()
    assert {parameter.dtype for parameter in parameters if parameter.requires_grad} == {torch.float32}


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_parameters_are_refused_with_the_reason(kind: DistributedType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(ValueError, match=rf"{kind.value}.*freed after the first.*PPOClip"):
        check_processes(Accelerator())


@pytest.mark.parametrize("wrong", [{"max_kl": 0.0}, {"damping": -1.0}, {"curvature_fraction": 0.0}])
def test_impossible_regions_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TRPO(**wrong)
