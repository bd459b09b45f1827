"""Evaluation that people quote: a file in the shape of RewardBench 2, top-1 of K, agreement of several scorers."""

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config

from reward_model import RewardModel
from reward_model.data.comparisons import as_comparisons
from reward_model.evaluate import main as evaluate
from reward_model.evaluation.ranking_metrics import agreement, ties_score, top_1_credit
from reward_model.evaluation.report_card import report_card
from tests.reward_model.conftest import classifier, saved, serving
from tests.support.tiny_models import VOCAB_SIZE

SUBSETS = ("Factuality", "Focus", "Math", "Precise IF", "Safety")
WORDS = ["the", "movie", "was", "good", "bad", "boring", "lovely", "awful", "film", "story", "plot", "music", "ending"]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    return saved(classifier(config), tmp_path_factory.mktemp("scorer"))


def benchmark_rows(seed: int = 0) -> list[dict[str, Any]]:
    """Best of 4 in five subsets of different sizes, and five prompts of Ties with their references."""
    draw = random.Random(seed)

    def texts(count: int) -> list[str]:
        return [" ".join(draw.choices(WORDS, k=draw.randint(2, 8))) for _ in range(count)]

    def row(name: str, subset: str, correct: int, wrong: int) -> dict[str, Any]:
        return {
            "id": name, "prompt": f"Question {name}?", "chosen": texts(correct), "rejected": texts(wrong),
            "num_correct": correct, "num_incorrect": wrong, "total_completions": correct + wrong,
            "models": ["human"] * (correct + wrong), "subset": subset, "additional_metadata": {"category": None},
        }  # fmt: skip

    rows = [row(f"{s}-{i}", s, 1, 3) for size, s in enumerate(SUBSETS) for i in range(2 + 2 * size)]
    rows += [row(f"ref:{n}", "Ties", 1, 4) for n in range(5)] + [row(f"tied:{n}", "Ties", 2 + n, 3) for n in range(5)]
    draw.shuffle(rows)
    return rows


def oracle(rows: list[dict[str, Any]], scores: list[list[float]]) -> dict[str, float]:
    """RewardBench 2 by hand: 1 / #top if the correct one is on top; Ties by its published weights."""
    by_subset: dict[str, list[float]] = {}
    stats: dict[str, tuple[bool, float, float]] = {}
    for row, values in zip(rows, scores, strict=True):
        correct, wrong = values[: row["num_correct"]], values[row["num_correct"] :]
        if row["subset"] == "Ties":
            stats[row["id"]] = min(correct) > max(wrong), max(correct) - min(correct), min(correct) - max(wrong)
        else:
            by_subset.setdefault(row["subset"], []).append((correct[0] == max(values)) / values.count(max(values)))
    numbers = [name[5:] for name in stats if name.startswith("tied:")]
    spread, margin = (np.array([stats[f"tied:{n}"][part] for n in numbers]) for part in (1, 2))
    reference = np.array([stats[f"ref:{n}"][2] for n in numbers])
    ties = (
        0.3 * np.mean([stats[f"tied:{n}"][0] for n in numbers])
        + 0.3 * np.mean([stats[f"ref:{n}"][0] for n in numbers])
        + 0.2 * np.mean(margin > spread)
        + 0.2 * np.mean(np.minimum(margin, reference) > spread)
        + 0.01 * np.mean(np.tanh(np.minimum(margin, reference) / spread - 1))
    )
    result = {name: float(np.mean(values)) for name, values in by_subset.items()} | {"Ties": float(ties)}
    counts = {name: len(values) for name, values in by_subset.items()} | {"Ties": len(stats)}
    total = sum(counts.values())
    return result | {
        "mean": sum(result.values()) / len(result),
        "weighted": sum(result[name] * count / total for name, count in counts.items()),
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_a_file_in_the_shape_of_rewardbench_2_equals_the_oracle(scorer: Path, tmp_path: Path, seed: int) -> None:
    rows = benchmark_rows(seed)
    data = tmp_path / "benchmark.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = RewardModel.from_pretrained(scorer)
    scores = [model([row["prompt"]] * row["total_completions"], row["chosen"] + row["rejected"]) for row in rows]
    expected = oracle(rows, scores)
    target = tmp_path / "card.json"
    page = "none" if seed else str(tmp_path / "card.html")
    card = evaluate([str(scorer), "--data", str(data), "--json", str(target), "--page", page])
    top_1 = card["top_1"]
    for name in SUBSETS:
        assert top_1["subsets"][name]["value"] == pytest.approx(expected[name], abs=1e-12)
        assert top_1["subsets"][name]["chance"] == pytest.approx(0.25)
    assert top_1["ties"]["score"] == pytest.approx(expected["Ties"], abs=1e-6)
    assert top_1["mean"] == pytest.approx(expected["mean"], abs=1e-6)
    assert top_1["weighted_mean"] == pytest.approx(expected["weighted"], abs=1e-6)
    assert json.loads(target.read_text())["top_1"]["ties"]["score"] == top_1["ties"]["score"]
    if not seed:
        html = (tmp_path / "card.html").read_text()
        assert "Top-1 of K" in html and "Ties score" in html and "Factuality" in html


def test_a_malformed_row_of_a_benchmark_is_named_or_skipped(scorer: Path, tmp_path: Path) -> None:
    rows = benchmark_rows()
    data = tmp_path / "benchmark.jsonl"
    for changes, reason in [
        ({"rejected": []}, "'rejected' must be a list of one or more texts"),
        ({"chosen": [None]}, "'chosen' must be a list"),
        ({"num_correct": 7}, "'num_correct' is 7"),
        ({"prompt": 5}, "'prompt' must be text"),
    ]:
        data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | changes]))
        command = [str(scorer), "--data", str(data), "--page", "none", "--json", str(tmp_path / "card.json")]
        with pytest.raises(ValueError, match=rf"benchmark.jsonl:{len(rows) + 1}: field {reason}"):
            evaluate(command)
        counts = evaluate([*command, "--on_bad_row", "skip"])["data"]
        assert (counts["rows"], counts["bad"], counts["comparisons"], counts["not_encodable"]) == (41, 1, 40, 0)


def test_columns_of_a_benchmark_can_be_named(scorer: Path, tmp_path: Path) -> None:
    data = tmp_path / "benchmark.jsonl"
    rows = [{"question": f"How {n}?", "best": ["good"], "rejected": ["bad", "awful"], "part": "A"} for n in range(2)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [str(scorer), "--data", str(data), "--page", "none", "--json", str(tmp_path / "card.json"), "--columns"]
    card = evaluate([*command, "prompt=question", "chosen=best", "subset=part"])
    assert card["top_1"]["subsets"]["A"]["count"] == 2 and card["top_1"]["subsets"]["A"]["chance"] == pytest.approx(
        1 / 3
    )
    with pytest.raises(ValueError, match="unknown names \\['winning'\\]"):
        evaluate([*command, "winning=best"])


def test_a_shared_first_place_counts_by_its_share() -> None:
    assert top_1_credit(torch.tensor([2.0, 1.0, 0.0]), (0, 1, 1)) == 1.0
    assert top_1_credit(torch.tensor([2.0, 2.0, 0.0]), (0, 1, 1)) == 0.5
    assert top_1_credit(torch.tensor([1.0, 2.0, 0.0]), (0, 1, 1)) == 0.0


def test_ties_without_any_spread_count_by_the_sign_of_their_margin() -> None:
    """0 / 0 counts as nothing, a positive margin over no spread as tanh(inf) = 1."""
    same, low = torch.tensor([1.0, 1.0]), torch.tensor([0.0])
    full = ties_score({"tied:1": (same, low), "ref:1": (same[:1], low)})
    assert full["correctness_margin"] == 1.0 and full["score"] == pytest.approx(1.01)
    none = ties_score({"tied:1": (same, same), "ref:1": (same[:1], same)})
    assert none["correctness_margin"] == 0.0 and none["score"] == 0.0


def test_top_1_of_ordinary_rankings_is_on_the_card(reward_model: RewardModel) -> None:
    row = {"prompt": "The movie was ", "completions": ["awful", "great lovely good", "bad"], "scores": [0, 2, 1]}
    card = report_card(reward_model, as_comparisons([row] * 3, "rows"))
    assert card["top_1"]["subsets"]["all"]["value"] == 1.0 and card["top_1"]["mean"] == 1.0


@given(st.integers(0, 99))
def test_agreement_is_kendalls_tau_within_prompts(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    first, second = torch.randint(0, 5, (2, 7), generator=torch.Generator().manual_seed(seed)).double()
    found = agreement([first], [second])
    a, b = first.numpy(), second.numpy()
    expected = stats.kendalltau(a, b).statistic
    assert found["kendall_tau"] == pytest.approx(expected, nan_ok=True)
    pairs = [(i, j) for i in range(7) for j in range(i)]
    alike = [np.sign(a[i] - a[j]) == np.sign(b[i] - b[j]) for i, j in pairs]
    assert found["pairwise"] == pytest.approx(float(np.mean(alike)))
    shifted = agreement([first, first + 100], [second, second - 100])
    assert shifted["kendall_tau"] == pytest.approx(expected, nan_ok=True), "prompts are not compared with each other"


def test_several_scorers_are_compared_with_the_model(scorer: Path, trained_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "The movie was ", "chosen": good, "rejected": bad} for good in WORDS[3:8:4] for bad in WORDS[4:6]
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, other = RewardModel.from_pretrained(trained_folder), RewardModel.from_pretrained(scorer)
    with serving(other) as url:
        command = [str(trained_folder), "--data", str(data), "--page", "none", "--json", str(tmp_path / "card.json")]
        found = evaluate([*command, "--others", str(scorer), url])["agreement"]
    signs = []
    for scores in (model, other):
        sides = [
            scores([row["prompt"] for row in rows], [row[side] for row in rows]) for side in ("chosen", "rejected")
        ]
        signs.append(np.sign(np.subtract(*sides)))
    assert found["accuracy"][str(scorer)]["value"] == pytest.approx(float(np.mean(signs[1] > 0)))
    alike = float(np.mean(signs[0] == signs[1]))
    for row in found["pairs"][:2]:
        assert row["pairwise"] == pytest.approx(alike) and row["kendall_tau"] == pytest.approx(2 * alike - 1)
    assert found["pairs"][2]["models"] == [str(scorer), url] and found["pairs"][2]["kendall_tau"] == pytest.approx(1.0)
    assert not math.isnan(found["accuracy"]["this model"]["value"])
