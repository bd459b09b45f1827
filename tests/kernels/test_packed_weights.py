"""Decoding with packed weights draws what decoding with plain ones draws, whatever the layers are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ppo.kernels import linear_layers, packed_weights
from rlhf_ppo.kernels.linear_layers import use_fast_layers
from rlhf_ppo.kernels.packed_weights import PackedWeights
from rlhf_ppo.samplers import batch_decoder
from rlhf_ppo.samplers.base import Samples, SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.support.tiny_models import tiny_gpt2, tiny_llama

PROMPTS = [torch.tensor([5, 6, 7]), torch.tensor([8, 9]), torch.tensor([11] * 9), torch.tensor([4])]
# Rows leave at different steps: 12 rows at first, fewer than four in the end.
SAMPLING = SamplingConfig(max_new_tokens=24, stop_token_ids=tuple(range(0, 1024, 24)), num_return_sequences=3)


def wide_llama(dtype: torch.dtype = torch.float32) -> Any:
    return tiny_llama(vocab_size=1024, hidden_size=512, num_hidden_layers=1, initializer_range=0.05, dtype=dtype)


def with_biases() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=1024, initializer_range=0.05, attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def with_adapter() -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(wide_llama(), config)


def low_precision() -> Any:
    model = wide_llama()
    use_fast_layers(model, matmul_dtype=torch.bfloat16)
    return model


@pytest.fixture(autouse=True)
def _always_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of this machine does not decide what is tested."""
    monkeypatch.setattr(packed_weights, "packing_is_faster", lambda dtype: True)
    monkeypatch.setattr(linear_layers, "bfloat16_is_faster", lambda: True)
    monkeypatch.setattr(packed_weights, "MIN_STEPS", dict.fromkeys(packed_weights.MIN_STEPS, 16))


def drawn(model: Any) -> Samples:
    return DecodeLoop()(model, PROMPTS, SAMPLING, generator=torch.Generator().manual_seed(0))


def packed_layers(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> int:
    """How many layers had a packed weight while `run` ran."""
    found: list[int] = []
    release = PackedWeights.release

    def counted(self: PackedWeights) -> None:
        found.append(len(self.layers))
        release(self)

    monkeypatch.setattr(PackedWeights, "release", counted)
    run()
    return found[0]


def packs_bfloat16() -> bool:
    """Whether oneDNN takes such weights here; the product asks the same."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(64, 64, dtype=torch.bfloat16), 16)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(("build", "expected"), [
    pytest.param(wide_llama, 7, marks=pytest.mark.slow), (with_biases, 7),
    (lambda: wide_llama(torch.bfloat16), 8), (with_adapter, 7), (low_precision, 8),
    (lambda: tiny_gpt2(vocab_size=1024, n_embd=512, n_layer=1, initializer_range=0.05), 4),
], ids=["llama", "biases", "bfloat16", "adapters", "bfloat16 products", "Conv1D"])  # fmt: skip
def test_the_same_is_drawn_while_rows_leave(
    monkeypatch: pytest.MonkeyPatch, build: Callable[[], Any], expected: int
) -> None:
    if expected == 8 and not packs_bfloat16():
        pytest.skip("oneDNN packs no bfloat16 weights on this processor")
    model = build()
    with monkeypatch.context() as patches:
        patches.setattr(packed_weights, "MIN_STEPS", dict.fromkeys(packed_weights.MIN_STEPS, 10**9))
        plain = drawn(model)
    found: list[Samples] = []
    assert packed_layers(monkeypatch, lambda: found.append(drawn(model))) == expected
    half = expected == 8
    assert len({len(response) for response in plain.responses}) > 3
    if not half:  # in bfloat16 another rounding may draw another token
        assert [row.tolist() for row in found[0].responses] == [row.tolist() for row in plain.responses]
        assert_close(torch.cat(found[0].logprobs or []), torch.cat(plain.logprobs or []), rtol=0, atol=1e-5)
    ids = torch.cat([found[0].prompts[0], found[0].responses[0]])
    with torch.no_grad():
        logits = model(ids[None]).logits[0, len(found[0].prompts[0]) - 1 : -1].float()
    truth = logits.log_softmax(-1).gather(-1, found[0].responses[0][:, None])[:, 0]
    assert_close((found[0].logprobs or [])[0], truth, rtol=0, atol=0.1 if half else 1e-5)
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_layers_of_one_input_share_a_product_and_each_still_reads_what_it_is_given() -> None:
    layer = with_biases().model.layers[0]
    attention, x, other = layer.self_attn, *torch.randn(2, 6, 1, 512)
    names = ("q_proj", "k_proj", "v_proj")
    expected = {name: [getattr(attention, name)(states) for states in (x, other)] for name in names}
    products: list[int] = []
    with packed_weights.packed_weights(layer) as packed, pytest.MonkeyPatch.context() as patches:
        packed.pack(steps=100)
        plain = packed_weights._product
        patches.setattr(packed_weights, "_product", lambda *given: products.append(1) or plain(*given))
        for states, index in ((x, 0), (other, 1)):
            for name in names:
                assert_close(getattr(attention, name)(states), expected[name][index])
        assert len(products) == 2
        assert_close(attention.q_proj(x), expected["q_proj"][0])  # k_proj and v_proj read something else
        assert_close(attention.k_proj(other), expected["k_proj"][1])
        assert_close(attention.k_proj(other), expected["k_proj"][1])
        assert_close(attention.v_proj(x), expected["v_proj"][0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_input_that_changes_in_place_between_two_layers_is_read_again(mode: Any) -> None:
    with mode(), packed_weights.packed_weights(layer := with_biases().model.layers[0]) as packed:
        attention, x = layer.self_attn, torch.randn(6, 1, 512)
        packed.pack(steps=100)
        attention.q_proj(x)
        x.mul_(2.0)
        key = attention.k_proj(x)
        packed.release()
        assert_close(key, attention.k_proj(x))


def test_a_layer_that_packing_would_change_keeps_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "_product", lambda x, packed, bias: torch.zeros(len(x), packed.shape[0]))
    model = wide_llama()
    assert packed_layers(monkeypatch, lambda: drawn(model)) == 0


def test_weights_are_plain_again_after_an_error_and_never_packed_for_short_responses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, limits = wide_llama(), SamplingConfig(max_new_tokens=8)
    assert packed_layers(monkeypatch, lambda: DecodeLoop()(model, PROMPTS, limits)) == 0

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(batch_decoder, "greedy_tokens", stop)
    with pytest.raises(KeyboardInterrupt):
        DecodeLoop()(model, PROMPTS, SamplingConfig(max_new_tokens=24, do_sample=False))
    assert not any("forward" in vars(module) for module in model.modules())
