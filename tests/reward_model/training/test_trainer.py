"""Training: what each setting changes, and runs that stop, resume or start from other kinds of model."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    FNetConfig,
    FNetModel,
)

from reward_model import Comparison, RewardModel, train_reward_model
from reward_model.data.comparisons import as_comparisons
from reward_model.evaluation.scoring import fit_normalization, held_out_metrics, score_completions
from reward_model.models.backbone import PAD_TOKEN, initialize_head, load_backbone
from reward_model.models.contract import Contract
from reward_model.models.encoding import LengthGroupedBatches
from reward_model.training.arguments import check_placement
from tests.models.zoo import build
from tests.reward_model.conftest import preference_rows, tiny_config
from tests.support.tiny_models import CHAT_TEMPLATE, tiny_gpt2, tiny_llama, tiny_tokenizer

PROMPTS, RESPONSES = ["The movie was "] * 2, ["great", "awful and boring"]


def test_the_head_is_drawn_with_variance_one_over_width_plus_one() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(9_999, 1))
    initialize_head(model, seed=0)
    assert float(model[1].weight.detach().std()) == pytest.approx(0.01, rel=0.03)
    assert float(model[1].bias.detach()) == 0.0


def test_a_decoder_that_pads_with_its_end_of_text_token_gets_a_padding_token(tmp_path: Path) -> None:
    """Otherwise the score would be read before the end-of-text token that the text rule appends."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tiny_gpt2().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, found, _ = load_backbone(str(tmp_path), seed=0)
    assert found.pad_token == PAD_TOKEN and found.pad_token_id != found.eos_token_id
    assert model.config.pad_token_id == found.pad_token_id
    assert model.get_input_embeddings().weight.shape[0] >= len(found)


@pytest.mark.parametrize(("build_model", "longest"), [(tiny_gpt2, 128), (tiny_llama, 200)])
def test_only_learned_positions_bound_the_texts(build_model: Any, longest: int, tmp_path: Path) -> None:
    model = build_model()
    assert model.config.max_position_embeddings == 128
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = preference_rows(24)
    config = tiny_config(tmp_path / "base", tmp_path / "rm", max_length=200)
    trained = train_reward_model(config, train=rows[:16], evaluation=rows[16:])
    assert Contract.read(trained.path).text.max_length == longest


def test_scores_are_normalized_on_the_held_out_completions(reward_model: RewardModel) -> None:
    rows = preference_rows(260)[200:]
    scores = torch.tensor(
        reward_model(
            [row["prompt"] for row in rows for _ in "ab"], [row[k] for row in rows for k in ("chosen", "rejected")]
        )
    )
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(scores.std()) == pytest.approx(1.0, abs=1e-5)


def test_scores_can_be_normalized_on_samples_of_the_reference_policy(tiny_base: Path, tmp_path: Path) -> None:
    rows = preference_rows(60)
    samples = [("The movie was ", text) for text in ("fine", "odd", "long and loud")]
    trained = train_reward_model(
        tiny_config(tiny_base, tmp_path / "rm"), train=rows[:40], evaluation=rows[40:], reference_samples=samples
    )
    model = RewardModel.from_pretrained(trained.path)
    scores = torch.tensor(model([prompt for prompt, _ in samples], [text for _, text in samples]))
    assert model.contract.normalization.reference == "reference policy"
    assert_close(scores.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert_close(scores.std(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_the_contract_tells_what_was_trained_on_what(trained_folder: Path) -> None:
    contract = Contract.read(trained_folder)
    assert (
        contract.data["train"] == 200 and contract.data["evaluation"] == 60 and len(contract.data["fingerprint"]) == 64
    )
    assert contract.metrics["accuracy"] > 0.9 and contract.metrics["pairs"] == 60
    assert contract.text.append_eos and contract.text.template == "plain" and contract.head == "score.weight"
    assert "/" not in json.dumps(contract.base), "no path of this machine"


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model_and_another_seed_another(tiny_base: Path, tmp_path: Path) -> None:
    rows = preference_rows(60)
    scores = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = train_reward_model(
            tiny_config(tiny_base, tmp_path / name, seed=seed), train=rows[:40], evaluation=rows[40:]
        ).path
        scores.append(RewardModel.from_pretrained(path).raw_scores(PROMPTS, RESPONSES))
    assert scores[0] == scores[1] != scores[2]


def test_an_encoder_that_reads_its_padding_is_scored_text_by_text(tmp_path: Path) -> None:
    """FNet's Fourier transform knows no mask."""
    config = FNetConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, intermediate_size=32)
    FNetModel(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = preference_rows(40)
    trained = train_reward_model(tiny_config(tmp_path / "base", tmp_path / "rm"), train=rows[:20], evaluation=rows[20:])
    loaded = RewardModel.from_pretrained(trained.path)
    alone = [loaded([prompt], [response])[0] for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    assert_close(loaded(PROMPTS, RESPONSES), alone)
    held_out = as_comparisons(rows[20:], "held out")
    scores = [loaded([row.prompt], [text])[0] for row in held_out for text in row.completions]
    assert_close(torch.tensor(scores).mean(), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_a_base_without_a_classifier_is_refused_with_a_way_out(tmp_path: Path) -> None:
    build("vision/llava").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"LlavaConfig.* save the language model alone"):
        load_backbone(str(tmp_path), seed=0)
    with pytest.raises(ValueError, match="there is no model folder"):
        load_backbone(str(tmp_path / "gone"), seed=0)


def test_a_chosen_attention_is_the_one_that_trains_and_one_that_is_not_installed_is_named(tiny_base: Path) -> None:
    model, *_ = load_backbone(str(tiny_base), seed=0, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"attn_implementation='sage' must be installed here"):
        load_backbone(str(tiny_base), seed=0, attn_implementation="sage")


@pytest.mark.parametrize(
    ("task", "remedy"), [("CAUSAL_LM", "rlhf-ppo merge .* and train from FOLDER"), ("SEQ_CLS", "merge_adapter=True")]
)
def test_an_adapter_is_no_model_to_begin_with(task: str, remedy: str, tiny_base: Path, tmp_path: Path) -> None:
    """transformers would load it frozen: there was nothing to train, and torch said so in its own words."""
    kind = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    lora = LoraConfig(task_type=task, target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(kind.from_pretrained(tiny_base), lora).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"got .*, an adapter on .*{remedy}"):
        load_backbone(str(tmp_path), seed=0)


def test_encoders_and_rotary_decoders_train_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = BertForSequenceClassification(
        BertConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                   max_position_embeddings=64, num_labels=2)
    )  # fmt: skip
    for name, model in (("encoder", encoder), ("llama", tiny_llama())):
        base = tmp_path / name
        model.save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        rows = preference_rows(120)
        trained = train_reward_model(tiny_config(base, tmp_path / f"rm-{name}"), train=rows[:90], evaluation=rows[90:])
        loaded = RewardModel.from_pretrained(trained.path)
        assert trained.metrics["accuracy"] > 0.8
        together, alone = (
            loaded(PROMPTS, RESPONSES),
            [loaded([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)],
        )
        assert_close(together, alone, atol=1e-5, rtol=0)


def test_dropout_is_off_also_where_a_model_calls_it_without_a_module(tmp_path: Path) -> None:
    rows, scores = preference_rows(40), []
    for dropout in (0.0, 0.5):
        model = build("opt")
        model.config.dropout = dropout
        base = tmp_path / str(dropout)
        model.save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        trained = train_reward_model(
            tiny_config(base, tmp_path / f"rm-{dropout}"), train=rows[:32], evaluation=rows[32:]
        )
        scores.append(RewardModel.from_pretrained(trained.path)(PROMPTS, RESPONSES))
    assert scores[0] == scores[1]


def test_conversations_are_trained_and_served_through_the_template(tiny_base: Path, tmp_path: Path) -> None:
    rows = [
        {
            "chosen": [{"role": "user", "content": f"Film {i}?"}, {"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "user", "content": f"Film {i}?"}, {"role": "assistant", "content": row["rejected"]}],
        }
        for i, row in enumerate(preference_rows(120))
    ]
    path = train_reward_model(tiny_config(tiny_base, tmp_path / "rm"), train=rows[:90], evaluation=rows[90:]).path
    model = RewardModel.from_pretrained(path)
    assert model.contract.text.template == "chat" and not model.contract.text.append_eos
    assert model.tokenizer.chat_template == CHAT_TEMPLATE
    assert model(["Film 1?"], ["great"]) == model([[{"role": "user", "content": "Film 1?"}]], ["great"])


def test_early_stop_keeps_the_best_weights(tiny_base: Path, tmp_path: Path) -> None:
    rows = preference_rows(130)
    settings = {"evaluations": 10, "early_stop_patience": 1, "epochs": 10.0}
    trained = train_reward_model(
        tiny_config(tiny_base, tmp_path / "rm", **settings), train=rows[:100], evaluation=rows[100:]
    )
    assert trained.metrics["accuracy"] > 0.9


def test_metrics_and_normalization_are_those_of_the_saved_model_in_any_precision(
    tiny_base: Path, tmp_path: Path
) -> None:
    rows = preference_rows(100)
    config = tiny_config(tiny_base, tmp_path / "rm", precision="bfloat16")
    trained = train_reward_model(config, train=rows[:80], evaluation=rows[80:])
    model = RewardModel.from_pretrained(trained.path)
    scored = score_completions(model, as_comparisons(rows[80:], "rows"))
    fitted = fit_normalization(scored.raw[0].tolist(), "evaluation")
    assert model.contract.normalization.gain == pytest.approx(fitted.gain, rel=1e-6)
    assert trained.metrics == pytest.approx(held_out_metrics(scored), rel=1e-6)


def test_held_out_ties_are_evaluated_and_refused_only_where_the_accuracy_is_followed(
    tiny_base: Path, tmp_path: Path
) -> None:
    rows = preference_rows(40)
    ties = [row | {"tie": True} for row in rows[30:]]
    config = tiny_config(tiny_base, tmp_path / "rm", evaluations=2, schedule="reduce_lr_on_plateau")
    with pytest.raises(ValueError, match=r"schedule=reduce_lr_on_plateau.*none of the 10 held-out .* is decided"):
        train_reward_model(config, train=rows[:30], evaluation=ties)
    assert (
        "accuracy"
        not in train_reward_model(
            tiny_config(tiny_base, tmp_path / "rm", evaluations=2), train=rows[:30], evaluation=ties
        ).metrics
    )


def test_rankings_of_unequal_length_train(tiny_base: Path, tmp_path: Path) -> None:
    rows = [
        Comparison(prompt="The movie was ", completions=("great", "good bad", "awful"), ranks=(0, 1, 2)),
        Comparison(prompt="The movie was ", completions=("lovely good", "boring"), ranks=(0, 1)),
    ] * 40
    trained = train_reward_model(tiny_config(tiny_base, tmp_path / "rm"), train=rows, evaluation=rows[:20])
    assert trained.metrics["accuracy"] == 1.0


def test_sharded_weights_are_refused_before_training(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under FSDP2 two processes trained to the end, and then waited for each other."""
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda _: DistributedType.FSDP))
    rows, config = preference_rows(20), tiny_config(tiny_base, tmp_path / "rm")
    with pytest.raises(ValueError, match=r"whole weights on each process, got FSDP.*ddp\.yaml"):
        train_reward_model(config, train=rows[:16], evaluation=rows[16:])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("stage", "refused"), [(1, False), (2, False), (3, True)])
def test_of_deepspeed_only_zero_3_shards_weights(stage: int, refused: bool) -> None:
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    accelerator: Any = SimpleNamespace(state=state, distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="got ZeRO-3") if refused else nullcontext():
        check_placement(accelerator)


def test_steps_see_texts_of_similar_length_in_an_order_that_the_epoch_changes() -> None:
    lengths = list(torch.randint(1, 200, (1_003,), generator=torch.Generator().manual_seed(0)).tolist())
    sampler = LengthGroupedBatches(lengths, batch_size=16, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(1_003)) and first == list(sampler)
    spreads = [max(part) - min(part) for i in range(0, 992, 16) for part in [[lengths[j] for j in first[i : i + 16]]]]
    assert sum(spreads) / len(spreads) < 20
    sampler.set_epoch(1)
    assert list(sampler) != first
