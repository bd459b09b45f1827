"""Losses, metrics and steps of the trainer have right values, whatever the cut into batches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import TrainerCallback

from reward_model import Comparison, RewardModel, RewardModelConfig, train_reward_model
from reward_model.data.comparisons import as_comparisons
from reward_model.evaluation.report_card import report_card
from reward_model.models.contract import TextRule
from reward_model.models.encoding import ComparisonCollator, LengthGroupedBatches, encode_comparisons, fill_last_step
from reward_model.training.preference_trainer import PreferenceTrainer
from tests.reward_model.conftest import preference_rows, tiny_config
from tests.support.tiny_models import tiny_tokenizer


def comparison(*texts: str, **labels: Any) -> Comparison:
    return Comparison(prompt="", completions=texts, ranks=labels.pop("ranks", tuple(range(len(texts)))), **labels)


def losses_of(comparisons: list[Comparison], scores: dict[str, float], **settings: Any) -> list[float]:
    """The loss of each comparison in one micro-batch, where every text has the score that is given."""
    tokenizer = tiny_tokenizer()
    rule = TextRule(template="plain", append_eos=False, max_length=64)
    encoded = encode_comparisons(comparisons, tokenizer, rule)
    batch = ComparisonCollator(pad_token_id=tokenizer.pad_token_id)(
        [encoded.dataset[i] for i in range(len(comparisons))]
    )
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    found = [scores[tokenizer.decode(ids[mask.bool()])] for ids, mask in rows]
    trainer = PreferenceTrainer.__new__(PreferenceTrainer)  # the losses read the settings alone
    trainer.settings = RewardModelConfig(model="", output_dir="", **settings)
    trainer.has_ties = any(item.is_tie for item in comparisons)
    losses: list[float] = trainer.losses(torch.tensor(found), batch).tolist()
    return losses


SCORES = {"good": 2.0, "bad": 0.0, "great": 3.0, "fine": 1.0, "awful": -1.0}
RANKING = comparison("great", "fine", "awful")
RANKING_LOSS = math.log1p(math.exp(-2) + math.exp(-4)) + math.log1p(math.exp(-2))


@pytest.mark.parametrize(
    ("labels", "settings", "expected"),
    [
        ({}, {}, math.log1p(math.exp(-2))),
        ({"margin": 3.0}, {}, math.log1p(math.e)),
        ({"preference": 0.0}, {}, math.log1p(math.exp(2))),
        ({}, {"label_smoothing": 0.1}, math.log1p(math.exp(-2)) + 0.1 * 2),
        ({"ranks": (0, 0)}, {}, math.log(math.e + math.exp(-1) + 1)),
        ({}, {"centering": 0.5}, math.log1p(math.exp(-2)) + 0.5 * (2 + 0) ** 2),
    ],
    ids=["plain", "margin", "preference", "smoothing", "tie", "centering"],
)
def test_a_pair_has_one_loss_whatever_stands_beside_it(
    labels: dict[str, Any], settings: dict[str, Any], expected: float
) -> None:
    """Scores 2 and 0, so d = 2: alone, beside a pair and beside a ranking, in either order."""
    pair = comparison("good", "bad", **labels)
    for neighbors in ([], [comparison("great", "awful")], [RANKING], [RANKING, comparison("fine", "bad")]):
        assert losses_of([pair, *neighbors], SCORES, **settings)[0] == pytest.approx(expected, rel=1e-5)
        assert losses_of([*neighbors, pair], SCORES, **settings)[-1] == pytest.approx(expected, rel=1e-5)


def test_a_ranking_keeps_its_loss_beside_pairs_with_labels() -> None:
    """Scores 3, 1, -1: log(1 + e^-2 + e^-4) + log(1 + e^-2)."""
    beside = [comparison("good", "bad", margin=3.0), comparison("good", "bad", ranks=(0, 0))]
    for row in ([RANKING], [*beside, RANKING]):
        assert losses_of(row, SCORES)[-1] == pytest.approx(RANKING_LOSS, rel=1e-5)


def test_a_preference_below_one_half_is_the_pair_turned_over() -> None:
    turned = comparison("bad", "good", preference=0.2, margin=-1.0)
    assert turned == comparison("good", "bad", preference=0.8, margin=1.0)
    assert losses_of([turned], SCORES) == pytest.approx([0.8 * math.log1p(math.exp(-1)) + 0.2 * math.log1p(math.e)])
    assert comparison("bad", "good", preference=0.5).completions == ("bad", "good")


def soft(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every second pair written the other way round with preference 0.2 in place of 0.8; every fifth undecided."""
    for index, row in enumerate(rows):
        row["preference"] = 0.8
        if index % 2:
            row |= {"chosen": row["rejected"], "rejected": row["chosen"], "preference": 0.2}
        if index % 5 == 0:
            row["preference"] = 0.5
    return rows


def test_preferences_are_measured_as_they_are_learned(tiny_base: Path, tmp_path: Path) -> None:
    """p < 0.5 turns the pair over, 0.5 is left out of accuracy and pairs, p weighs both sides of the log loss."""
    train, held_out = soft(preference_rows(160)), soft(preference_rows(40, seed=1))
    trained = train_reward_model(tiny_config(tiny_base, tmp_path / "rm", epochs=3.0), train=train, evaluation=held_out)
    assert trained.metrics["accuracy"] > 0.9 and trained.metrics["pairs"] == 32
    model = RewardModel.from_pretrained(trained.path)
    losses = []
    for row in held_out:
        if row["preference"] != 0.5:
            chosen, rejected = model.raw_scores([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
            p, d = row["preference"], chosen - rejected
            losses.append(p * math.log1p(math.exp(-d)) + (1 - p) * math.log1p(math.exp(d)))
    assert trained.metrics["log_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    card = report_card(model, as_comparisons(held_out, "held out"))
    assert card["pairs"] == 32 and card["ties"] == 8
    assert card["log_loss"] == pytest.approx(trained.metrics["log_loss"], rel=1e-4)
    assert card["accuracy"]["value"] == pytest.approx(trained.metrics["accuracy"])


class Logged(TrainerCallback):
    """Keeps what the trainer logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append(dict(logs))


def test_held_out_metrics_during_training_do_not_depend_on_the_cut_into_batches(
    tiny_base: Path, tmp_path: Path
) -> None:
    """9 held-out comparisons in batches of 8, 4, 1: loss, accuracy and margin are those of the finished model."""
    rows = preference_rows(25, seed=3)
    for index, row in enumerate(rows):
        row |= {"weight": [0.5, 4.0][index % 2], "tie": index % 4 == 3}
        if index % 3 == 0:
            row |= {"chosen": row["rejected"], "rejected": row["chosen"]}
    expected: dict[str, float] = {}
    for micro in (8, 4, 1):
        logged = Logged()
        config = tiny_config(
            tiny_base, tmp_path / str(micro), batch_size=8, micro_batch_size=micro, evaluations=2, learning_rate=1e-5
        )
        found = train_reward_model(config, train=rows[:16], evaluation=rows[16:], callbacks=[logged]).metrics
        last = [row for row in logged.rows if "eval_accuracy" in row][-1]
        assert last["eval_accuracy"] == pytest.approx(found["accuracy"])
        assert last["eval_margin"] == pytest.approx(found["margin"], rel=1e-4)
        expected = expected or last
        for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward"):
            assert last[name] == pytest.approx(expected[name], abs=1e-5)


def test_an_incomplete_last_step_learns_from_its_rows_once(tiny_base: Path, tmp_path: Path) -> None:
    """11 rows in steps of 8 end at the same weights in micro-batches of 8, 4 and 1, and count 11 rows of tokens."""
    rows = preference_rows(31, seed=4)
    scores, tokens = [], []
    for micro in (8, 4, 1):
        logged = Logged()
        config = tiny_config(
            tiny_base, tmp_path / str(micro), batch_size=8, micro_batch_size=micro, log_every=1, learning_rate=1e-5
        )
        path = train_reward_model(config, train=rows[:11], evaluation=rows[11:], callbacks=[logged]).path
        scores.append(RewardModel.from_pretrained(path).raw_scores(["It was "] * 2, ["great", "awful"]))
        steps = [row for row in logged.rows if "loss" in row]
        assert len(steps) == 2
        tokens.append(steps[-1]["num_tokens"])
    assert_close(scores[1], scores[0], atol=1e-5, rtol=0)
    assert_close(scores[2], scores[0], atol=1e-5, rtol=0)
    tokenizer = tiny_tokenizer()
    real = sum(
        len(tokenizer(row["prompt"] + row[name]).input_ids) + 1 for row in rows[:11] for name in ("chosen", "rejected")
    )
    assert tokens == [real] * 3


def test_fillers_are_in_the_last_step_alone() -> None:
    rows = [comparison("good " * (1 + index % 7), "bad") for index in range(11)]
    encoded = encode_comparisons(rows, tiny_tokenizer(), TextRule(template="plain", append_eos=True, max_length=64))
    filled = fill_last_step(encoded.dataset, 8)
    assert filled["weight"][11:] == [0.0] * 5 and len(filled) == 16
    assert len(fill_last_step(filled, 8)) == 16
    lengths = [length for length in filled["length"] if length]
    order = list(LengthGroupedBatches(lengths, batch_size=8, seed=0, fillers=5))
    assert sorted(order[:11]) == list(range(11)) and order[11:] == [11, 12, 13, 14, 15]
