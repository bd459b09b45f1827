"""The locomotion recipe from its settings to its run folder, in seconds."""

import json
from dataclasses import replace
from pathlib import Path

import ppo_locomotion as recipe
import pytest

from rlhf_ppo.control import ControlTrainer
from rlhf_ppo.report import RunFolder

CONFIG = recipe.Config(
    env="InvertedPendulum-v5", total_steps=3 * 128, environments=2, rollout_steps=64, epochs=1, eval_episodes=2,
    save_every=1,
)  # fmt: skip


def test_a_run_leaves_its_metrics_evaluation_picture_and_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no OpenGL the pictures are left out with a sentence, and everything else is there."""

    def without_opengl(*_: object, **__: object) -> None:
        raise RuntimeError("expected to render InvertedPendulum-v5")

    monkeypatch.setattr(recipe, "draw_frames", without_opengl)
    found = recipe.main(replace(CONFIG, output_dir=str(tmp_path / "run"), frames=2))
    assert found["deterministic"]["return"][0] > 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "checkpoint-3" / "manifest.json").is_file()
    assert len(json.loads((tmp_path / "run" / "evaluation.json").read_text())["stochastic"]["returns"]) == 2
    assert "expected to render InvertedPendulum-v5" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_run_goes_on_and_forgets_the_lines_behind_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the third iteration, whose checkpoint is not written any more; its line in the metrics is."""
    config = replace(CONFIG, output_dir=str(tmp_path / "run"), algorithm="trpo")
    whole = recipe.main(replace(config, output_dir=str(tmp_path / "whole")))
    save = ControlTrainer.save

    def interrupted(trainer: ControlTrainer, folder: Path) -> Path:
        if trainer.iteration == 3:
            raise KeyboardInterrupt
        return save(trainer, folder)

    monkeypatch.setattr(ControlTrainer, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(config)
    monkeypatch.setattr(ControlTrainer, "save", save)
    assert recipe.main(config) == whole
    assert RunFolder.open(tmp_path / "run").metrics() == RunFolder.open(tmp_path / "whole").metrics()
    with pytest.raises(ValueError, match=r"seed=0 \(now 1\)"):
        recipe.main(replace(config, seed=1))
