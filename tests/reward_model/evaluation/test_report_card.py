"""The report card: measures with known answers, and a command that writes table, JSON and page."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward_model import RewardModel
from reward_model.data.comparisons import as_comparisons
from reward_model.evaluate import main as evaluate
from reward_model.evaluation.metrics import (
    best_of_n,
    best_temperature,
    expected_calibration_error,
    length_slope,
    log_loss,
    pair_accuracy,
    wilson,
)
from reward_model.evaluation.report_card import report_card
from reward_model.score import main as score
from reward_model.train import main as train
from tests.reward_model.conftest import preference_rows


def test_wilson_interval_by_hand() -> None:
    """p = 1/2, n = 4, z = 2: center (1/2 + 4/8) / 2 = 1/2, half-width 2/2 * sqrt(1/16 + 4/64) = sqrt(1/8)."""
    share = wilson(2, 4, z=2.0)
    assert share.low == pytest.approx(0.5 - math.sqrt(1 / 8)) and share.high == pytest.approx(0.5 + math.sqrt(1 / 8))
    assert math.isnan(wilson(0, 0).value)


def test_equal_scores_are_half_right() -> None:
    assert pair_accuracy([1.0, -1.0, 0.0, 0.0]).value == 0.5
    assert log_loss(torch.zeros(3)) == pytest.approx(math.log(2))


def calibrated(count: int, scale: float) -> torch.Tensor:
    """Differences d whose pairs are right with probability s(|d|), times `scale`."""
    generator = torch.Generator().manual_seed(0)
    size = 3 * torch.rand(count, generator=generator, dtype=torch.float64)
    right = torch.rand(count, generator=generator, dtype=torch.float64) < torch.sigmoid(size)
    return scale * torch.where(right, size, -size)


def test_calibration_error_and_temperature_find_the_scale() -> None:
    assert expected_calibration_error(calibrated(50_000, 1.0)) < 0.01
    assert best_temperature(calibrated(50_000, 1.0)) == pytest.approx(1.0, abs=0.03)
    assert best_temperature(calibrated(50_000, 4.0)) == pytest.approx(4.0, abs=0.1)
    assert expected_calibration_error(calibrated(50_000, 4.0)) > 0.05
    assert best_temperature(-calibrated(1_000, 1.0)) == math.inf


def test_length_slope_is_the_slope() -> None:
    gaps = torch.tensor([10.0, -4.0, 7.0])
    assert length_slope(0.3 * gaps, gaps) == pytest.approx(0.3)
    assert length_slope(gaps, torch.zeros(3)) == 0.0


@given(st.integers(1, 6), st.integers(0, 99))
def test_best_of_n_is_the_mean_over_all_draws(n: int, seed: int) -> None:
    from itertools import combinations

    proxy, gold = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    draws = [max(draw, key=lambda index: float(proxy[index])) for draw in combinations(range(6), n)]
    assert best_of_n(proxy, gold, n) == pytest.approx(float(gold[draws].mean()))


def test_the_card_of_a_good_model(reward_model: RewardModel) -> None:
    rows = [row | {"source": "ab"[i % 2]} for i, row in enumerate(preference_rows(80, seed=5))]
    card = report_card(reward_model, as_comparisons(rows, "rows"), judge=reward_model)
    assert card["accuracy"]["value"] > 0.9 and card["pairs"] == 80
    assert set(card["by_source"]) == {"a", "b"}
    assert sum(bucket["count"] for bucket in card["by_length"].values()) == 80
    assert card["stability"]["batch_composition"] < 1e-5 and card["stability"]["padding_side"] < 1e-5
    assert card["stability"]["eos"] > 0
    curve = [point["judge"] for point in card["best_of_n"]]
    assert curve == sorted(curve), "the judge is the model itself, so more choice is better"


def test_quartiles_of_one_range_are_one_bucket_with_all_their_pairs(reward_model: RewardModel) -> None:
    rows = [row | {"margin": 2.0 if index < 10 else 1.0} for index, row in enumerate(preference_rows(40))]
    buckets = report_card(reward_model, as_comparisons(rows, "rows"))["by_margin"]["buckets"]
    assert {name: bucket["count"] for name, bucket in buckets.items()} == {
        "1 to 1 labeled": 30, "2 to 2 labeled": 10,
    }  # fmt: skip


def files(tmp_path: Path, tiny_base: Path) -> dict[str, str]:
    rows = [row | {"prompt": f"Film {i}: the movie was "} for i, row in enumerate(preference_rows(120))]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"data": str(data), "model": str(tiny_base), "output_dir": str(tmp_path / "rm"), "max-length": 64}
    config = tmp_path / "settings.yaml"
    config.write_text("\n".join(f"{name}: {value}" for name, value in settings.items()) + "\nlearning_rate: 0.5\n")
    return {"data": str(data), "config": str(config), "output": str(tmp_path / "rm")}


def test_the_commands_train_evaluate_and_score(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Values of the YAML file count, and flags override them."""
    paths = files(tmp_path, tiny_base)
    train(["--config", paths["config"], "--learning_rate", "1e-3", "--batch_size", "16", "--no_progress"])
    assert "accuracy" in capsys.readouterr().out
    card = evaluate([paths["output"], "--data", paths["data"]])
    assert card["accuracy"]["value"] > 0.8
    folder = Path(paths["output"])
    page = (folder / "report_card.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.split("base64,")[0]
    assert json.loads((folder / "report_card.json").read_text())["pairs"] == 120
    assert (folder / "report_card.png").read_bytes().startswith(b"\x89PNG")

    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "The movie was ", "response": "great"}\n{"response": "awful"}\n')
    scores = score(["--model", paths["output"], "--data", str(answers), "--output", str(tmp_path / "scored.jsonl")])
    written = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [row["score"] for row in written] == scores and written[0]["response"] == "great"
