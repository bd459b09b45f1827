"""The last layer on the tokens that are read gives what the whole one gives, and multiplies for nobody else."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM

from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.kernels import last_layer
from rlhf_ppo.kernels.last_layer import last_layer_at, tokenwise_modules
from rlhf_ppo.kernels.packing import padded_hidden
from rlhf_ppo.models.scoring import TokenPolicy
from tests.kernels.test_packing import RAGGED, bloom, inputs
from tests.samplers.test_decode_loop import ARCHITECTURES
from tests.support.tiny_models import VOCAB_SIZE, tiny_gpt2

EQUAL = ((4, 6), (7, 3), (1, 9), (9, 1))


def mixtral() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCAB_SIZE, **sizes, **experts)).eval()


def opt() -> Any:
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCAB_SIZE, word_embed_proj_dim=16, **sizes)).eval()


BUILD = ARCHITECTURES | {"mixtral": mixtral, "opt": opt, "bloom": bloom}


def scored(policy: TokenPolicy, rows: TokenInputs) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities, entropy, values, and the gradients of a sum of them."""
    output = policy(rows, with_entropy=True)
    (output.logprobs.sum() + output.entropy.square().sum() + output.values.square().sum()).backward()
    outputs = [output.logprobs.detach(), output.entropy.detach(), output.values.detach()]
    return outputs, [p.grad for p in policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("architecture", sorted(set(BUILD) - {"gpt2-lora"}))
@pytest.mark.parametrize("lengths", [EQUAL, RAGGED], ids=["one-length", "ragged"])
def test_skipping_what_nobody_reads_leaves_results_and_gradients(architecture: str, lengths: Any) -> None:
    rows, results = inputs(*lengths), []
    for skips in (False, True):
        torch.manual_seed(0)
        policy = TokenPolicy(AutoModelForCausalLMWithValueHead.from_pretrained(BUILD[architecture]()), packing=True)
        policy.proven = policy.paths if skips else replace(policy.paths, last_layer=False)
        results.append((*scored(policy, rows), policy.work["last_layer_tokens"], policy.work["trunk_tokens"]))
    (outputs, gradients, everywhere, positions), (found, loss_gradient, read, _) = results
    for a, b in zip(found, outputs, strict=True):
        assert_close(a, b, rtol=0, atol=1e-5)
    for a, b in zip(loss_gradient, gradients, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))
    assert all(float(values.abs().max()) > 0 for values in found)
    assert everywhere == positions
    bloom_adds_the_residual_inside = architecture == "bloom"
    assert read == (positions if bloom_adds_the_residual_inside else sum(b + 1 for _, b in lengths))


def test_the_parts_left_out_see_the_tokens_that_are_read_alone() -> None:
    model, seen = tiny_gpt2(), []
    policy = TokenPolicy(model, packing=True)
    assert policy.paths.last_layer
    for layer in model.base_model.h:
        layer.mlp.c_fc.register_forward_hook(lambda module, x, output: seen.append(output[..., 0].numel()))
    policy(inputs(*EQUAL))
    assert seen == [40] * (len(seen) - 1) + [sum(b + 1 for _, b in EQUAL)]
    assert len(seen) == model.config.n_layer >= 2


class Neighbourly(nn.Module):
    """A feed-forward layer that looks at the token before, as recurrent architectures do."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.plain(x + x.roll(1, dims=1))
        return result


def test_a_layer_that_looks_at_its_neighbors_is_found_out() -> None:
    model = tiny_gpt2()
    assert TokenPolicy(model, packing=True).paths.last_layer
    model.base_model.h[-1].mlp = Neighbourly(model.base_model.h[-1].mlp)
    assert "last_layer" in TokenPolicy(model, packing=True).paths.declined


def test_keys_or_values_by_another_name_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that are read look at those of all others: the trial must leave some out to notice."""
    model = ARCHITECTURES["llama"]()
    assert TokenPolicy(model, packing=True).paths.last_layer
    monkeypatch.setattr(last_layer, "PROJECTION_NAMES", (*last_layer.PROJECTION_NAMES, "v_proj"))
    assert not TokenPolicy(model, packing=True).paths.last_layer


def test_layers_in_two_stacks_are_left_alone() -> None:
    """Which of them comes last, nobody knows."""
    layers = tiny_gpt2().base_model
    layers.more = nn.ModuleList(nn.Identity() for _ in layers.h)
    assert tokenwise_modules(layers) == []


def test_an_architecture_with_other_names_is_left_alone() -> None:
    layers = tiny_gpt2().base_model
    layers.h[-1] = nn.Sequential(layers.h[-1])
    assert tokenwise_modules(layers) == []


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, on switching checkpointing on
def test_checkpointed_layers_run_whole() -> None:
    model = tiny_gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = TokenPolicy(model, packing=True)
    policy.checkpointing = True
    policy(inputs(*EQUAL)).logprobs.sum().backward()
    assert policy.work["last_layer_tokens"] == 40


def test_the_layer_is_its_own_again_whatever_happens() -> None:
    layers = tiny_gpt2().base_model
    parts = tokenwise_modules(layers)
    parts[0].forward = own = parts[0].forward  # as an engine exchanges it
    with pytest.raises(IndexError), last_layer_at(layers, torch.tensor([99])):
        layers(torch.arange(2, 9)[None])
    assert parts[0].forward is own
    assert not any("forward" in vars(part) for part in parts[1:])
    rows = [torch.arange(2, 9)]
    whole = padded_hidden(layers, rows).states
    padded_hidden(layers, rows, first_read=[5])
    assert_close(padded_hidden(layers, rows).states, whole, rtol=0, atol=0)


def test_second_derivatives_go_through_it() -> None:
    """TRPO's Fisher products differentiate twice."""
    model = tiny_gpt2().double()
    policy, products = TokenPolicy(model, packing=True), []
    for skips in (False, True):
        policy.proven = replace(policy.paths, last_layer=skips)
        rows = inputs(*EQUAL)
        (logits,), _ = policy.outputs_and_metric(rows, torch.ones(4, 9, dtype=torch.float64))
        weight = model.base_model.h[0].mlp.c_fc.weight
        (slope,) = torch.autograd.grad(logits.logsumexp(dim=-1).sum(), weight, create_graph=True)
        products.append(torch.autograd.grad(slope.square().sum(), weight)[0])
    assert float(products[0].abs().max()) > 0
    assert_close(products[1], products[0], rtol=1e-9, atol=1e-12)
