"""The head itself: width, start, dropout, dtype, and reading it back from files."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config, OPTConfig, OPTForCausalLM

from rlhf_ppo.models import AutoModelForCausalLMWithValueHead, ValueHead
from rlhf_ppo.models.value_head import load_value_head, read_value_head
from tests.support.tiny_models import tiny_gpt2


def test_the_default_start_is_the_first_draw_of_a_linear_layer() -> None:
    """Loading draws nothing before the head, so that a seed gives the values it gives in other libraries."""
    torch.manual_seed(42)
    expected = torch.nn.Linear(32, 1)
    torch.manual_seed(42)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    assert torch.equal(model.v_head.summary.weight, expected.weight)
    assert torch.equal(model.v_head.summary.bias, expected.bias)


def test_a_model_loaded_from_a_folder_starts_with_the_same_head(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    torch.manual_seed(42)
    expected = torch.nn.Linear(32, 1)
    torch.manual_seed(42)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert torch.equal(model.v_head.summary.weight, expected.weight)


def test_the_normal_start_has_the_asked_spread_and_no_bias() -> None:
    torch.manual_seed(0)
    head = ValueHead(GPT2Config(n_embd=1024), v_head_init_strategy="normal", v_head_initializer_range=0.5)
    assert float(head.summary.weight.detach().std()) == pytest.approx(0.5, rel=0.1)
    assert float(head.summary.bias.detach()) == 0.0


def test_a_range_of_zero_starts_every_value_at_zero() -> None:
    head = ValueHead(tiny_gpt2().config, v_head_init_strategy="normal", v_head_initializer_range=0.0)
    assert_close(head(torch.randn(3, 5, 32)), torch.zeros(3, 5, 1))


def test_an_unknown_start_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be None, 'normal' or 'orthogonal', got 'zeros'"):
        ValueHead(tiny_gpt2().config, v_head_init_strategy="zeros")


def test_dropout_comes_from_the_argument_then_the_config_then_a_tenth() -> None:
    config = tiny_gpt2().config
    assert ValueHead(config).dropout.p == 0.1
    config.summary_dropout_prob = 0.5
    assert ValueHead(config).dropout.p == 0.5
    assert ValueHead(config, summary_dropout_prob=0.0).dropout.p == 0.0


def test_a_float32_head_computes_in_float32_on_a_bfloat16_trunk() -> None:
    assert ValueHead(tiny_gpt2().config)(torch.randn(2, 3, 32, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_head_reads_the_projected_hidden_state_of_opt_350m() -> None:
    """There the output embeddings are narrower than the layers."""
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=32,
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(OPTForCausalLM(config).eval())
    _, _, values = model(torch.tensor([[3, 4, 5]]))
    assert model.v_head.summary.in_features == 16
    assert values.shape == (1, 3)


def test_a_head_of_a_classic_checkpoint_is_read_without_unpickling_code(tmp_path: Path) -> None:
    weights = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.full((1,), 2.0)}
    torch.save({**weights, "transformer.wte.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_model.bin")
    tensors = read_value_head(tmp_path)
    assert tensors is not None
    assert sorted(tensors) == ["summary.bias", "summary.weight"]
    assert_close(tensors["summary.bias"], torch.tensor([2.0]))


def test_a_pickle_that_holds_code_is_refused(tmp_path: Path) -> None:
    torch.save({"v_head.summary.weight": Path}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        read_value_head(tmp_path)


def test_a_folder_without_a_head_gives_none(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    assert read_value_head(tmp_path) is None


def test_a_head_of_another_width_is_an_error_naming_both() -> None:
    head = ValueHead(tiny_gpt2().config)
    with pytest.raises(ValueError, match=r"belongs to another model") as error:
        load_value_head(head, {"summary.weight": torch.ones(1, 8), "summary.bias": torch.ones(1)}, source="folder")
    assert "(1, 8)" in str(error.value) and "(1, 32)" in str(error.value)


@pytest.mark.parametrize("max_shard_size", ["1GB", "50KB"])
def test_a_head_saved_as_a_variant_is_read_back(max_shard_size: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=max_shard_size)
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path, variant="fp16")
    assert torch.equal(loaded.v_head.summary.weight, model.v_head.summary.weight)
