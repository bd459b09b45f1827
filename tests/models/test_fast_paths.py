"""A policy gives the log-probabilities of the model's own call, whatever stands between its layers and its logits."""

import logging
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Cohere2Config,
    CohereConfig,
    FalconH1Config,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertDecoderConfig,
    OlmoConfig,
    RemBertConfig,
)

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.models.gradient_check import LARGE, some_trained_parameters
from rlhf_ppo.models.scoring import TokenPolicy
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.support.tiny_models import VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 1,
    "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
BERT = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
CONFIGS: dict[str, Any] = {
    "granite": GraniteConfig(**SIZES, logits_scaling=8.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.0625),
    "cohere2": Cohere2Config(**SIZES, logit_scale=0.25),
    "falcon-h1": FalconH1Config(
        **SIZES, lm_head_multiplier=0.3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    ),
    "modernbert-decoder": ModernBertDecoderConfig(**BERT),
    "bert": BertConfig(**BERT, is_decoder=True),
    "rembert": RemBertConfig(**BERT, is_decoder=True, input_embedding_size=16, output_embedding_size=24),
    "llama4": Llama4TextConfig(
        **SIZES, head_dim=8, intermediate_size_mlp=64, attention_chunk_size=8, num_local_experts=2
    ),
    "olmo": OlmoConfig(**SIZES, clip_qkv=0.5),
}  # fmt: skip
PLAIN = {"modernbert-decoder", "bert", "rembert"}
"""Architectures with layers between the trunk and the LM head."""


def built(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def rows(*lengths: tuple[int, int]) -> TokenInputs:
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randint(2, VOCAB_SIZE, (a + b,), generator=generator) for a, b in lengths]
    pairs = zip(draw, lengths, strict=True)
    return TokenInputs(
        prompts=[row[:a] for row, (a, _) in zip(draw, lengths, strict=True)], responses=[r[a:] for r, (a, _) in pairs]
    )


def own_logprobs(model: Any, inputs: TokenInputs) -> list[Tensor]:
    """Of each response, by the model's own call on its row alone."""
    found = []
    with torch.no_grad():
        for prompt, response in zip(inputs.prompts, inputs.responses, strict=True):
            logits = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
            found.append(logits.float().log_softmax(dim=-1).gather(1, response[:, None]).squeeze(1))
    return found


def trainer_of(model: Any, **settings: Any) -> PPOTrainer:
    config = PPOConfig(batch_size=3, mini_batch_size=3, ppo_epochs=1, learning_rate=1e-3, **settings)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    return PPOTrainer(config, policy, None, tiny_tokenizer())


RAGGED = rows((4, 9), (7, 3), (2, 18))


NOT_CAUSAL = {"rembert"} if transformers.__version__.startswith("5.10.") else set()
"""Attends to later tokens in that release, although it is a decoder: the policy refuses it."""


FAST_TIER = ("cohere", "granite", "modernbert-decoder")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST_TIER else pytest.mark.slow)
        for name in sorted(CONFIGS.keys() - NOT_CAUSAL)
    ],
)
def test_a_step_scores_what_the_models_own_call_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And learns: its first ratios are 1, so gradients and scores are those of one model."""
    monkeypatch.setattr("rlhf_ppo.kernels.linear_layers.onednn_is_faster", lambda: True)
    model = built(name)
    expected = own_logprobs(model, RAGGED)
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    trainer = trainer_of(model)
    scores = [torch.tensor(score) for score in (1.0, -1.0, 0.5)]
    statistics = trainer.step(list(RAGGED.prompts), list(RAGGED.responses), scores)
    assert trainer.last_batch is not None
    for found, row in zip(trainer.last_batch[1].logprobs, expected, strict=True):
        assert_close(found[: len(row)], row, rtol=0, atol=1e-4)
    assert trainer.diagnosis.is_healthy
    assert abs(float(statistics["objective/kl"])) < 1e-5
    moved = [key for key, weight in model.state_dict().items() if not torch.equal(weight, before[key])]
    assert len(moved) >= len(list(model.parameters())) - 2
    policy: Any = trainer.policy
    assert policy.paths.head_rows is (name not in PLAIN)


def test_what_was_declined_is_said_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rlhf_ppo"):
        assert not TokenPolicy(built("bert"), packing=True).paths.head_rows
    (message,) = [record.getMessage() for record in caplog.records if "declined" in record.getMessage()]
    assert "BertLMHeadModel" in message
    assert "logits of all tokens are computed" in message


def test_nothing_is_declined_or_said_where_all_is_right(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rlhf_ppo"):
        for model in (tiny_gpt2(), tiny_llama()):
            paths = TokenPolicy(model, packing=True).paths
            assert paths.packing and paths.last_layer and paths.head_rows and paths.fused_head
    assert not [record for record in caplog.records if "declined" in record.getMessage()]


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BertConfig(**BERT, is_decoder=False)).eval()
    with pytest.raises(ValueError, match=r"expected a causal model, got BertLMHeadModel.*is_decoder"):
        _ = TokenPolicy(model).paths


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    model = tiny_gpt2()
    model.transformer.h[0].mlp.act = Noise()
    with pytest.raises(ValueError, match="expected"):
        _ = TokenPolicy(model).paths


def test_the_proof_leaves_random_numbers_modes_and_counters_alone() -> None:
    model = tiny_gpt2().train()
    policy = TokenPolicy(model, packing=True)
    before = torch.get_rng_state()
    assert policy.paths.packing
    assert torch.equal(before, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not policy.work and all(parameter.grad is None for parameter in model.parameters())


def test_the_proof_runs_few_tokens_through_the_layers() -> None:
    model = tiny_llama()
    tokens: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda _, given, __: tokens.append(given[0].numel()))
    assert TokenPolicy(model, packing=True).paths.packing
    assert tokens == [3 * 6, 6 + 5 + 4]  # all, padded; all, packed
    tokens.clear()
    assert DecodeLoop().unsupported_reason(model) is None
    assert len(tokens) == 4  # the prompts, two more tokens, and the model's own call on both samples
    assert tokens[1:] == [4, 2, 2 * 7]


def test_the_proof_computes_no_gradient_of_a_large_embedding() -> None:
    model = tiny_llama(tie_word_embeddings=False, vocab_size=LARGE // 32 + 1)
    names = set(some_trained_parameters(model))
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & names
    assert {"model.layers.0.self_attn.q_proj.weight", "model.norm.weight"} <= names
    assert "lm_head.weight" in some_trained_parameters(tiny_llama(tie_word_embeddings=False))


class Rescaled(nn.Module):
    """Multiplies gradients, not values, as a wrong kernel may."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, *given: Any, **settings: Any) -> Any:
        output = self.plain(*given, **settings)
        if settings.get("row_groups") is not None:
            output = (output[0].detach() + 2 * (output[0] - output[0].detach()), *output[1:])
        return output


def test_a_fast_path_with_a_wrong_gradient_is_declined_alone() -> None:
    model = tiny_llama()
    model.model.layers[0].self_attn = Rescaled(model.model.layers[0].self_attn)
    paths = TokenPolicy(model, packing=True).paths
    assert set(paths.declined) == {"packing"}
    assert "gradient" in paths.declined["packing"]
    assert paths.last_layer and paths.head_rows


class Shrinking(nn.Module):
    """Attends as plain attention in rows of up to 16 tokens, and to nothing beyond them when packed."""

    def __init__(self, plain: nn.Module, factor: float = 0.5) -> None:
        super().__init__()
        self.plain, self.factor = plain, factor

    def forward(self, *given: Any, **settings: Any) -> Any:
        output = self.plain(*given, **settings)
        groups = settings.get("row_groups")
        long = groups is not None and max(length for _, length in groups) > 16
        return (output[0] * self.factor, *output[1:]) if long else output


def test_a_fast_path_that_differs_in_long_rows_alone_is_declined_at_the_first_of_them() -> None:
    model = tiny_llama()
    model.model.layers[0].self_attn = Shrinking(model.model.layers[0].self_attn)
    policy = TokenPolicy(model, packing=True)
    assert policy.paths.packing
    with torch.no_grad():
        found = policy(RAGGED).logprobs
    for row, expected in zip(found, own_logprobs(model, RAGGED), strict=True):
        assert_close(row[: len(expected)], expected, rtol=0, atol=1e-4)
    assert set(policy.paths.declined) == {"packing"}


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_rows_beside_one_beyond_the_rotations_limit_are_scored_as_alone(kind: str) -> None:
    """The longest row of a batch rotates all of them; rows of up to 14 tokens are on one side of 16."""
    rotary = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rotary |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "max_position_embeddings": 16}, rope_parameters=rotary)).eval()
    short, long = rows((3, 3)), rows((10, 10))
    before, _, after = (own_logprobs(model, batch)[0] for batch in (short, long, short))
    if not torch.equal(before, after):
        pytest.skip("transformers 5.10 rotates a row by the longest one that it has read before")
    policy = TokenPolicy(model, packing=True)
    for batch in (rows((3, 4), (7, 7)), rows((3, 3), (10, 10)), rows((2, 3), (9, 10))):
        with torch.no_grad():
            found = policy(batch).logprobs
        for row, expected in zip(found, own_logprobs(model, batch), strict=True):
            assert_close(row[: len(expected)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_what_bfloat16_rounds_declines_a_fast_path_only_where_products_are_in_float32(
    autocast: torch.dtype | None,
) -> None:
    """Rows side by side and alone round differently under autocast; this much would be a fault in float32."""
    model = tiny_llama()
    model.model.layers[0].self_attn = Shrinking(model.model.layers[0].self_attn, factor=0.98)
    policy = TokenPolicy(model, packing=True)
    assert policy.paths.packing
    policy.trunk.autocast = autocast
    with torch.no_grad():
        policy(RAGGED)
    assert set(policy.paths.declined) == ({"packing"} if autocast is None else set())
