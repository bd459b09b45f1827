"""Rows side by side give what rows below each other give, and no padding goes through the trunk."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from transformers import AttentionInterface, BloomConfig, BloomForCausalLM

from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.kernels import packing
from rlhf_ppo.kernels.packing import packing_matches
from rlhf_ppo.models.scoring import TokenPolicy
from tests.models.zoo import build
from tests.samplers.test_decode_loop import ARCHITECTURES
from tests.support.tiny_models import VOCAB_SIZE, tiny_gpt2


def inputs(*lengths: tuple[int, int]) -> TokenInputs:
    """Random prompts and responses of the given lengths."""
    generator = torch.Generator().manual_seed(3)

    def tokens(length: int) -> Tensor:
        return torch.randint(2, VOCAB_SIZE, (length,), generator=generator)

    return TokenInputs(prompts=[tokens(a) for a, _ in lengths], responses=[tokens(b) for _, b in lengths])


RAGGED = ((3, 9), (5, 2), (1, 11), (5, 2), (8, 1))


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"gpt2-lora"}))
def test_packed_rows_have_the_log_probabilities_and_gradients_of_padded_ones(architecture: str) -> None:
    results = []
    for packed_rows in (False, True):
        model = ARCHITECTURES[architecture]()
        policy = TokenPolicy(model, packing=packed_rows)
        output = policy(inputs(*RAGGED), with_entropy=True)
        (output.logprobs.sum() + output.entropy.square().sum()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((output, gradients, policy))
    (padded, theirs, _), (packed, ours, policy) = results
    assert_close(packed.logprobs, padded.logprobs, rtol=0, atol=1e-5)
    assert_close(packed.entropy, padded.entropy, rtol=0, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))
    assert policy.work["real_tokens"] == 12 + 7 + 12 + 7 + 9
    is_eager = model.config._attn_implementation == "eager"  # soft-capped gemma2; transformers before 5.18 ran sdpa
    assert policy.work["trunk_tokens"] == (5 * 12 if is_eager else policy.work["real_tokens"])


def test_attention_in_bfloat16_autocast_rounds_its_result_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's backward pass of attention in bfloat16 takes several times that in float32."""
    seen = []
    plain = packing.sdpa_attention_forward

    def attention(module: Any, query: Tensor, *arguments: Any, **settings: Any) -> Any:
        output, weights = plain(module, query, *arguments, **settings)
        seen.append((query.dtype, output.dtype))
        return output, weights

    monkeypatch.setattr(packing, "sdpa_attention_forward", attention)
    rows = [torch.arange(2, 9), torch.arange(3, 14)]
    with torch.autocast("cpu", torch.bfloat16):
        states = packing.packed_hidden(tiny_gpt2().transformer, rows).states
    states.square().sum().backward()
    assert set(seen) == {(torch.float32, torch.float32)}


def bloom() -> Any:
    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=16, n_layer=1, n_head=2)).eval()


def eager() -> Any:
    model = tiny_gpt2()
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("build", [bloom, eager])
def test_a_model_that_is_not_torchs_attention_is_padded(build: Callable[[], Any]) -> None:
    policy = TokenPolicy(build(), packing=True)
    output = policy(inputs(*RAGGED))
    assert output.logprobs.isfinite().all()
    assert policy.work["trunk_tokens"] == 5 * 12


def test_a_model_that_sees_its_neighbors_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the runs, attention reaches from one row into the next."""
    from rlhf_ppo.kernels import packing

    model = tiny_gpt2()
    rows = [torch.arange(2, 9), torch.arange(4, 9)]
    assert packing_matches(model.base_model, rows)
    plain = packing.packed_attention

    def leaking(*arguments: Any, row_groups: Any, **settings: Any) -> Any:
        return plain(*arguments, row_groups=[(1, sum(count * length for count, length in row_groups))], **settings)

    monkeypatch.setitem(AttentionInterface._global_mapping, packing.ATTENTION_NAME, leaking)
    assert not packing_matches(model.base_model, rows)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' own, on switching checkpointing on
def test_checkpointed_layers_are_padded_and_the_models_attention_is_left_alone() -> None:
    model = tiny_gpt2()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = TokenPolicy(model, packing=True)
    policy.checkpointing = True
    policy(inputs(*RAGGED)).logprobs.sum().backward()
    assert policy.work["trunk_tokens"] == 5 * 12
    assert model.config._attn_implementation == "sdpa"


def test_a_window_hides_what_is_further_back_in_its_own_row_alone() -> None:
    """A window as wide as the longest row hides nothing; a narrower one hides the first token from the last."""
    from rlhf_ppo.kernels import packing

    states = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    module = torch.nn.Module()

    def attention(**settings: Any) -> Tensor:
        return packing.packed_attention(module, *states, None, row_groups=[(1, 3), (1, 5)], **settings)[0]

    whole = attention(sliding_window=5)
    with sdpa_kernel(SDPBackend.MATH):
        assert_close(attention(), whole)
    windowed = attention(sliding_window=4)
    assert_close(windowed[:, :-1], whole[:, :-1])
    assert not torch.allclose(windowed[:, -1], whole[:, -1])


@pytest.mark.parametrize(("name", "packs"), [("phimoe", False), ("doge", False), ("mistral", True)])
def test_a_window_that_only_the_mask_knows_is_not_packed(name: str, packs: bool) -> None:
    """Short rows, as those of the trial, are the same: they are within the window."""
    layers = build(name).base_model
    assert packing_matches(layers, [torch.arange(5, 12), torch.arange(20, 25)]) == packs
