"""How many tokens a model has positions for: as many run, and one more does not."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLNetConfig,
)

from rlhf_ppo.models.trunk import learned_positions, max_positions
from rlhf_ppo.samplers.decode_support import check_positions
from tests.support.tiny_architectures import config_of


def runs(model: Any, length: int) -> bool:
    ids = torch.full((1, length), 5)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", ["bert", "gpt2", "mpnet", "longformer", "xlm-roberta-xl", "data2vec-text", "ibert"])
def test_positions_are_counted_from_where_the_model_begins(name: str) -> None:
    model = AutoModelForSequenceClassification.from_config(config_of(name)).eval()
    limit = max_positions(model)
    assert limit is not None and limit == learned_positions(model)
    assert runs(model, limit) and not runs(model, limit + 1)


@pytest.mark.parametrize("padding", [0, 1, 3])
def test_a_policy_like_roberta_has_no_positions_up_to_its_padding(padding: int) -> None:
    config = tiny(RobertaConfig(is_decoder=True, pad_token_id=padding))
    model = AutoModelForCausalLM.from_config(config).eval()
    assert max_positions(model) == 40 - padding - 1
    check_positions(model, 39 - padding)
    with pytest.raises(ValueError, match=f"max_position_embeddings = {39 - padding}, got {40 - padding}"):
        check_positions(model, 40 - padding)


def test_rotary_positions_go_on_and_relative_ones_have_no_limit() -> None:
    llama = AutoModelForCausalLM.from_config(tiny(LlamaConfig()))
    assert (max_positions(llama), learned_positions(llama)) == (40, None)
    xlnet = AutoModelForSequenceClassification.from_config(
        XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=16)
    )
    assert (max_positions(xlnet), learned_positions(xlnet)) == (None, None)


@pytest.mark.parametrize("has_table", [True, False])
def test_deberta_reads_beyond_the_positions_of_its_configuration_unless_it_has_a_table_of_them(has_table: bool) -> None:
    config = DebertaV2Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, relative_attention=True, position_buckets=8, position_biased_input=has_table,
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config).eval()
    assert learned_positions(model) == (40 if has_table else None)
    assert runs(model, 60) is not has_table


@pytest.mark.parametrize("name", ["bart", "biogpt", "codegen", "ctrl", "gptj", "openai-gpt", "opt", "xglm"])
def test_tables_are_found_under_every_name(name: str) -> None:
    model = AutoModelForCausalLM.from_config(config_of(name))
    assert max_positions(model) is not None and learned_positions(model) == max_positions(model)


def tiny(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config with one narrow layer and 40 positions."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 40}
    return type(config)(**(config.to_dict() | sizes | heads | {"head_dim": 8}))
