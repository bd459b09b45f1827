"""What a training run records, and where: metrics.jsonl, trackers, the curve on the report card, learning rates."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from reward_model import RewardModelConfig, train_reward_model
from reward_model.evaluate import main as evaluate
from reward_model.train import main as train
from reward_model.training.tracking import training_curves
from reward_model.utils.commands import run
from tests.reward_model.conftest import preference_rows, tiny_config

ROWS = [row | {"prompt": f"Film {index}: the movie was "} for index, row in enumerate(preference_rows(60))]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_shorter_than_the_interval_of_its_logs_keeps_its_first_and_last_loss(
    tiny_base: Path, tmp_path: Path
) -> None:
    """3 steps of 16; the loss of the first is that of a model without an opinion, near log 2."""
    config = tiny_config(tiny_base, tmp_path / "rm", evaluations=3)
    trained = train_reward_model(config, train=ROWS[:48], evaluation=ROWS[48:])
    rows = metrics_of(trained.path)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert 0.3 < rows[0]["loss"] < 1.2 and "loss" in rows[2]
    assert [row["eval_accuracy"] for row in rows][-1] == pytest.approx(trained.metrics["accuracy"])
    (curves,) = training_curves(trained.path)
    assert curves["loss"] == {"step": [1, 3], "value": [rows[0]["loss"], rows[2]["loss"]]}
    assert curves["accuracy"]["step"] == [1, 2, 3]


def test_tensorboard_events_are_in_the_folder_of_the_model(tiny_base: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(tiny_base, tmp_path / "rm", trackers="tensorboard", evaluations=2, log_every=1)
    path = train_reward_model(config, train=ROWS[:48], evaluation=ROWS[48:]).path
    events = EventAccumulator(str(path / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    expected = {row["step"]: row["loss"] for row in metrics_of(path) if "loss" in row}
    assert losses == pytest.approx(expected) and len(losses) == 3
    assert {event.step for event in events.Scalars("eval/accuracy")} == {1, 2, 3}


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        ("wandb", "trackers names wandb, which is not installed"),
        ("tensorboard,mlflow", "trackers names mlflow, which is not installed"),
        ("tensorbord", "got 'tensorbord': nothing would be recorded there"),
    ],
)
def test_a_tracker_that_is_not_there_is_a_sentence(
    trackers: str, message: str, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Before anything is loaded or written, wherever the tests run."""
    for name in ("wandb", "mlflow"):
        monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{name}_available", lambda: False)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--data", str(data), "--model", str(tiny_base), "--output_dir", str(tmp_path / "rm"), "--no_progress"]
    with pytest.raises(SystemExit) as ended:
        run(train, [*flags, "--trackers", trackers])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl"}


class Tracker:
    """Stands for the module of a tracker: keeps what transformers gives it."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.config: dict[str, Any] = {}
        self.name = ""

    def init(self, name: str = "", **_: Any) -> None:
        self.name = name

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)


def test_other_trackers_get_the_metrics_under_the_name_of_the_model(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The callback of transformers is used as it is, here with a module in trackio's place."""
    module: Any = Tracker()
    module.finish = module.__class__
    module.context_vars = type(
        "Variables", (), {"current_space_id": type("Id", (), {"get": staticmethod(lambda: None)})}
    )
    module.config = type("Config", (dict,), {"update": lambda self, values, **_: None})()
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: True)
    config = tiny_config(tiny_base, tmp_path / "film_reward", trackers="trackio")
    train_reward_model(config, train=ROWS[:48], evaluation=ROWS[48:])
    assert module.name == "film_reward"
    assert any("train/loss" in row and row["train/global_step"] == 3 for row in module.logged)


@pytest.mark.slow
def test_the_report_card_shows_the_curve(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--data", str(data), "--model", str(tiny_base), "--no_progress", "--learning_rate", "1e-3"]
    single = train([*flags, "--output_dir", str(tmp_path / "single"), "--batch_size", "16", "--evaluations", "2"])
    card = evaluate([str(single), "--data", str(data), "--on_bad_row", "stop"])
    assert card["training"][0]["loss"]["step"] == [1, 4] and card["training"][0]["accuracy"]["step"] == [2, 4]
    assert json.loads((single / "report_card.json").read_text())["training"] == card["training"]
    page = (single / "report_card.html").read_text()
    assert "loss, first → last" in page and "held-out accuracy, first → last" in page
    ensemble = train([*flags, "--output_dir", str(tmp_path / "both"), "--batch_size", "16", "--ensemble", "2"])
    assert len(evaluate([str(ensemble), "--data", str(data), "--page", "none"])["training"]) == 2
    (single / "metrics.jsonl").unlink()  # of an earlier version
    assert evaluate([str(single), "--data", str(data), "--page", "none"])["training"] == []


def rates(base: Path, output: Path, **settings: Any) -> list[float]:
    """The learning rate of each of 20 steps, in units of the peak."""
    config = tiny_config(base, output, batch_size=2, log_every=1, learning_rate=1e-4, **settings)
    path = train_reward_model(config, train=ROWS[:40], evaluation=ROWS[40:]).path
    return [row["learning_rate"] / 1e-4 for row in metrics_of(path)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1 / 2] + [(20 - step) / 19 for step in range(1, 20)]),
        ({"warmup": 0.2}, [(step + 1) / 5 for step in range(4)] + [(20 - step) / 16 for step in range(4, 20)]),
        pytest.param({"warmup": 0.0}, [(20 - step) / 20 for step in range(20)], marks=pytest.mark.slow),
        ({"schedule": "polynomial", "schedule_arguments": ["power=2", "lr_end=0"], "warmup": 0.0},
         [((20 - step) / 20) ** 2 for step in range(20)]),
        ({"schedule": "warmup_stable_decay", "schedule_arguments": ["num_decay_steps=5", "decay_type=linear"]},
         [1 / 2] + [1.0] * 15 + [0.8, 0.6, 0.4, 0.2]),
    ],
    ids=["short warm-up", "warm-up", "none", "polynomial", "warmup_stable_decay"],
)  # fmt: skip
def test_rates_follow_the_schedule_and_no_first_step_is_lost(
    settings: dict[str, Any], expected: list[float], tiny_base: Path, tmp_path: Path
) -> None:
    """By hand: W warm-up steps rise by 1 / (W + 1) each, and the steps after them are as without the shift."""
    assert rates(tiny_base, tmp_path / "rm", **settings) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, "schedule must be of constant, .* got 'cosin'"),
        ({"schedule": "cosine_with_min_lr"}, "cosine_with_min_lr cannot be built .*min_lr"),
        ({"schedule": "constant", "schedule_arguments": ["num_cycles=2"]}, "takes no num_cycles"),
        ({"schedule_arguments": ["num_cycles"]}, "takes name=value, such as num_cycles=2, got 'num_cycles'"),
        ({"schedule": "reduce_lr_on_plateau"}, "follows the held-out accuracy, but evaluations=1"),
    ],
)
def test_schedules_that_cannot_be_built_are_refused_before_anything_is_loaded(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = RewardModelConfig(model="no such model", output_dir=str(tmp_path / "rm"), **settings)
    with pytest.raises(ValueError, match=message):
        train_reward_model(config, train=ROWS[:48], evaluation=ROWS[48:])


@pytest.mark.slow
def test_a_plateau_lowers_the_rate_where_the_accuracy_stops_rising(tiny_base: Path, tmp_path: Path) -> None:
    """Held-out accuracy is 1 or stays: after `patience` evaluations without a rise the rate is multiplied by 0.5."""
    found = rates(
        tiny_base, tmp_path / "rm", schedule="reduce_lr_on_plateau", evaluations=20,
        schedule_arguments=["factor=0.5", "patience=0", "threshold=1.1", "threshold_mode=abs"],
    )  # fmt: skip
    assert found[:4] == pytest.approx([1.0, 1.0, 0.5, 0.25])
