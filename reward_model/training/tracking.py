"""Record a training run: `metrics.jsonl`, a progress bar, and the trackers that are asked for."""

import os
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
)

from rlhf_ppo.loop.run_folder import METRICS, RunFolder
from rlhf_ppo.utils.progress import ProgressBar

TENSORBOARD = "tensorboard"
"""The tracker, and its folder in the output folder."""
RECORDS = (METRICS, TENSORBOARD)
"""What moves from the folder of the training into that of the finished model."""


def tracker_names(trackers: str) -> list[str]:
    """The names of a comma-separated list; `none` is no tracker, `all` every one that is installed.

    Raises:
        ValueError: transformers knows no tracker of that name.
        ImportError: A tracker is not installed.
    """
    names = [name for item in trackers.split(",") if (name := item.strip()) and name != "none"]
    if names == ["all"]:
        return list(get_available_reporting_integrations())
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(
                f"trackers must be of {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, all or none, got {name!r}: nothing "
                "would be recorded there. Correct the name; several are separated by commas."
            )
        if not _is_installed(name):
            raise ImportError(
                f"trackers names {name}, which is not installed: nothing would be recorded there. Install it (pip "
                f"install {name}), or leave it out: {METRICS} is written in any case."
            )
    return names


def _is_installed(name: str) -> bool:
    checks = (f"is_{word}_available" for word in (name, name.removesuffix("_ml"), name.replace("_", "")))
    check = next((getattr(integration_utils, check) for check in checks if hasattr(integration_utils, check)), None)
    return check is None or bool(check())


def tracker_callbacks(names: list[str], folder: Path, checkpoint: Path | None) -> list[TrainerCallback]:
    """Transformers' callbacks of these trackers; TensorBoard writes into `folder`. For the main process only.

    Args:
        checkpoint: The resumed one, after whose step TensorBoard hides what the interrupted run wrote; None: a new run.
    """
    callbacks: list[TrainerCallback] = []
    purge = None if checkpoint is None else int(checkpoint.name.rpartition("-")[2]) + 1
    for name in names:
        if name == TENSORBOARD:
            from torch.utils.tensorboard import SummaryWriter

            target = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(folder / TENSORBOARD)
            callbacks.append(TensorBoardCallback(SummaryWriter(log_dir=target, purge_step=purge)))
        else:
            callbacks.append(INTEGRATION_TO_CALLBACK[name]())
        if name == "wandb":
            callbacks.append(FinishWandbCallback())
    return callbacks


class FinishWandbCallback(TrainerCallback):
    """Ends the run of Weights & Biases that training has begun: each member of an ensemble gets its own."""

    def __init__(self) -> None:
        import wandb

        self.wandb: Any = wandb
        self.is_ours = self.wandb.run is None

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End it; one that the caller has begun goes on."""
        if self.is_ours:
            self.wandb.finish()


class MetricsFileCallback(TrainerCallback):
    """Writes `metrics.jsonl`: one object per logged step, with held-out metrics where there was an evaluation.

    The first and the last step are logged in every run, however short, and those with a checkpoint: a resumed run
    continues the file with the same lines.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = RunFolder(folder)
        self._row: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop the lines of steps after the checkpoint, which a resumed run writes again."""
        if state.is_world_process_zero:
            RunFolder.create(self.folder.path).resume_from(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for these logs and, in a run with evaluations, for one at the last step."""
        if state.global_step in (1, state.max_steps) or control.should_save:
            control.should_log = True
        if state.global_step == state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append a line, or complete that of this step."""
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        step = state.global_step
        if self._row.get("step") == step:
            self.folder.resume_from(step - 1)
        else:
            self._row = {"step": step}
        self._row |= {name: value for name, value in logs.items() if isinstance(value, int | float)}
        self.folder.append_metrics(step, self._row)


_SHOWN = ("loss", "accuracy", "eval_accuracy")


class ProgressBarCallback(ProgressCallback):
    """The Trainer's progress bar, with the metrics behind it instead of printed above it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.current_step = state.global_step  # of a resumed run
        if state.is_world_process_zero:
            options = {"total": state.max_steps, "initial": state.global_step}
            self.training_bar: Any = ProgressBar(desc="Reward model", unit="step", **options)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the last metrics; the Trainer would print them as a dict."""
        shown = {name: f"{float(logs[name]):.3f}" for name in _SHOWN if name in (logs or {})}
        if self.training_bar is not None and shown:  # the last log has the run's time alone
            self.training_bar.set_postfix(shown)


def training_curves(folder: Path) -> list[dict[str, Any]]:
    """Loss, and held-out accuracy if it was evaluated, by step: of a reward model, or of each member of an ensemble.

    Empty where there is no `metrics.jsonl`: earlier versions wrote none.
    """
    folders = [
        path.parent for path in [folder / METRICS, *sorted(folder.glob(f"member-*/{METRICS}"))] if path.is_file()
    ]
    columns = {"loss": "loss", "accuracy": "eval_accuracy"}
    curves = [{name: RunFolder(path).series(column) for name, column in columns.items()} for path in folders]
    return [{name: {"step": steps, "value": values} for name, (steps, values) in run.items()} for run in curves]
