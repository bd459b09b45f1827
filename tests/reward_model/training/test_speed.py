"""What makes training and scoring on a CPU faster changes neither weights nor scores."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from reward_model import RewardModel, train_reward_model
from reward_model.models.backbone import layers_of
from reward_model.training.preference_trainer import PreferenceTrainer
from rlhf_ppo.kernels.linear_layers import FastConv1D, FastLinear
from tests.reward_model.conftest import preference_rows, tiny_config
from tests.support.tiny_models import VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_tokenizer

PLAIN: dict[str, Any] = {"packing": False, "fast_products": False}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each pass through an embedding of tokens, as they come."""
    found: list[int] = []
    plain = torch.nn.Embedding.forward

    def counted(module: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        if module.num_embeddings == VOCAB_SIZE:
            found.append(ids.numel())
        return plain(module, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", counted)
    return found


@pytest.mark.parametrize("build", [tiny_gpt2, pytest.param(tiny_llama, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"lora_rank": 4}, marks=pytest.mark.slow),
        pytest.param({"centering": 0.01}, marks=pytest.mark.slow),
    ],
    ids=["full", "lora", "centering"],
)
def test_training_ends_at_the_weights_of_plain_training(
    build: Any, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ppo.kernels.linear_layers.onednn_is_faster", lambda: True)
    build().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows, weights = preference_rows(100), []
    for name, settings in (("plain", PLAIN), ("fast", {})):
        config = tiny_config(tmp_path / "base", tmp_path / name, **changes, **settings)
        folder = train_reward_model(config, train=rows[:80], evaluation=rows[80:]).path
        weights.append(load_file(folder / "model.safetensors"))
    plain, fast = weights
    assert plain.keys() == fast.keys()
    start = load_file(tmp_path / "base" / "model.safetensors")
    shared = [name for name in start if name in plain]
    moved = sum(float((plain[name] - start[name]).square().sum()) for name in shared)
    apart = sum(float((plain[name] - fast[name]).square().sum()) for name in plain)
    assert moved > 1e-3
    assert apart <= 1e-4 * moved  # a hundredth of its length: key biases have no gradient but rounding


def test_no_padding_goes_through_the_layers_and_products_are_exchanged(
    tiny_base: Path, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ppo.kernels.linear_layers.onednn_is_faster", lambda: True)
    fast: list[int] = []
    for kind in (FastLinear, FastConv1D):
        monkeypatch.setattr(kind, "forward", _counting(kind.forward, fast))
    trained: list[int] = []
    fast_in_training = [0]
    step = PreferenceTrainer.training_step

    def counted(*arguments: Any, **options: Any) -> Any:
        passes.clear()
        loss = step(*arguments, **options)
        trained.append(passes[0])
        fast_in_training[0] = len(fast)
        return loss

    monkeypatch.setattr(PreferenceTrainer, "training_step", counted)
    rows, found = preference_rows(60), {}
    for name, settings in (("plain", PLAIN), ("fast", {}), ("checkpointed", {"gradient_checkpointing": True})):
        trained.clear()
        fast.clear()
        config = tiny_config(tiny_base, tmp_path / name, batch_size=20, **settings)
        train_reward_model(config, train=rows[:40], evaluation=rows[40:])
        assert len(fast) == (fast_in_training[0] if settings != PLAIN else 0)  # what is judged afterwards is plain
        found[name] = (sum(trained), bool(fast))
    tokenizer = tiny_tokenizer()
    texts = [row["prompt"] + row[side] for row in rows[:40] for side in ("chosen", "rejected")]
    real = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    assert found["fast"] == (real, True)
    assert found["plain"][0] == found["checkpointed"][0] > 1.1 * real
    assert not found["plain"][1]


def _counting(forward: Any, calls: list[int]) -> Any:
    def counted(module: Any, inputs: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        result: torch.Tensor = forward(module, inputs)
        return result

    return counted


def test_scoring_runs_real_tokens_only_and_scores_as_a_padded_pass(
    reward_model: RewardModel, passes: list[int]
) -> None:
    rows = [list(range(2, 2 + length)) for length in (30, 3, 17, 4, 4)]
    alone = [reward_model.score_ids([row])[0] for row in rows]
    reward_model.score_ids(rows)  # the first ragged batch tries both ways
    passes.clear()
    assert_close(reward_model.score_ids(rows), alone, rtol=0, atol=1e-6)
    assert passes == [58]


def test_an_encoder_stays_padded(tmp_path: Path, passes: list[int]) -> None:
    """It reads in both directions: side by side, rows would see their neighbors."""
    config = BertConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = preference_rows(60)
    config_of_run = tiny_config(tmp_path / "base", tmp_path / "rm")
    path = train_reward_model(config_of_run, train=rows[:40], evaluation=rows[40:]).path
    model = RewardModel.from_pretrained(path)
    plain = AutoModelForSequenceClassification.from_pretrained(path)
    assert type(layers_of(plain)).__name__ == "BertModel"
    ids = [[2, 3, 4, 5, 6, 7, 8], [9, 10]]
    model.score_ids(ids)
    passes.clear()
    expected = [float(plain(torch.tensor([row])).logits.detach()) for row in ids]
    passes.clear()
    assert_close(model.score_ids(ids), expected, rtol=0, atol=1e-6)
    assert passes == [14]
