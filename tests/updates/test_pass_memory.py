"""What a pass needs is counted on the model, and fitted into free memory; the planner's trace is the second opinion."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.models.critic import SeparateCritic, attach_critic
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.models.shared_base_adapters import attach_critic_adapter
from rlhf_ppo.plan.config import PlanConfig
from rlhf_ppo.plan.traces import _trace_at_depth
from rlhf_ppo.updates.optimizers import adam
from rlhf_ppo.updates.pass_memory import SHARE, PassMemory, PassSize, fit_pass, pass_memory, unallocated_state
from tests.support.tiny_models import tiny_gpt2, tiny_llama, tiny_t5

NEED = PassMemory(kept=100.0, recomputed=10.0, fixed=1000.0)


@pytest.mark.parametrize(("available", "longest", "found"), [
    (5000, 30, PassSize(30, False)),  # 4000 of 5000 are planned, 1000 are fixed: 3000 hold 30 tokens
    (5000, 31, PassSize(300, True)),
    (1250, 8, PassSize(8, True)),  # nothing is left: a row at a time, as small as can be
])  # fmt: skip
def test_activations_are_recomputed_only_where_the_longest_row_would_not_fit(
    available: int, longest: int, found: PassSize
) -> None:
    assert SHARE == 0.8
    assert fit_pass(NEED, available, longest, checkpointing=False) == found


def test_where_activations_are_recomputed_anyway_more_tokens_fit() -> None:
    assert fit_pass(NEED, 5000, 8, checkpointing=True) == PassSize(300, True)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 4])
def test_the_count_per_token_is_that_of_the_planner_s_trace(layers: int) -> None:
    """Two rows more of the traced pass, over the tokens that they have: counted by other code, at other lengths."""
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=64, intermediate_size=192, num_attention_heads=4, vocab_size=64
    )
    policy = TokenPolicy(AutoModelForCausalLMWithValueHead.from_pretrained(LlamaForCausalLM(config)))
    traced = []
    for rows in (2, 4):
        plan = PlanConfig(
            precision="float32", mini_batch_size=rows, batch_size=4, prompt_tokens=96, new_tokens=32, device="cuda"
        )
        traced.append(_trace_at_depth(config, plan).saved)
    per_token = (traced[1] - traced[0]) / (2 * 128)
    counted = pass_memory(policy).kept / (1 + 2 / layers)
    assert counted == pytest.approx(per_token, rel=0.15)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, tiny_t5])
def test_every_architecture_is_counted_and_left_as_it_was(build: Any) -> None:
    model = build()
    policy = TokenPolicy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    need = pass_memory(policy)
    assert need.kept > need.recomputed > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("shares_base", [False, True])
def test_the_pass_of_a_separate_critic_is_counted_beside_the_policy_s(shares_base: bool) -> None:
    """It is as large as the policy's, and its graph is alive at the same time."""
    peft = LoraConfig(target_modules="all-linear") if shares_base else None
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama(), peft_config=peft)
    alone = pass_memory(TokenPolicy(model))
    if shares_base:
        attach_critic_adapter(model)
    else:
        attach_critic(model, SeparateCritic.from_policy(model))
    both = pass_memory(TokenPolicy(model))
    layers = model.config.num_hidden_layers
    saved = alone.kept / (1 + 2 / layers)
    assert both.kept - alone.kept == pytest.approx(saved, rel=0.1)
    assert both.recomputed - alone.recomputed == pytest.approx(both.kept - alone.kept)


def test_gradients_and_moments_are_expected_until_they_are_there() -> None:
    layer = torch.nn.Linear(4, 2, bias=False)
    optimizer = adam(list(layer.parameters()), lr=1e-3)
    assert unallocated_state(layer, optimizer) == 32 + 64
    layer(torch.ones(4)).sum().backward()
    optimizer.step()
    assert unallocated_state(layer, optimizer) == 0
