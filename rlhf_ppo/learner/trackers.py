"""Accelerate's trackers: started once, without secrets, and continued by a resumed run."""

import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.utils.redaction import redacted

RUN_NAMES = {"wandb": "id", "trackio": "name"}
"""Tracker -> the attribute that names its run, and the argument that continues the run of that name."""


def check_tracker(log_with: str | None, tracker_kwargs: Mapping[str, Any], project: Mapping[str, Any]) -> None:
    """Check that Accelerate has the tracker, and its package is installed: it would drop a missing one in silence.

    Args:
        tracker_kwargs: Settings by tracker.
        project: Arguments of `ProjectConfiguration`.

    Raises:
        ValueError: It is unknown or not installed, has no folder, or the settings are not those of a tracker.
    """
    if flat := [name for name, settings in tracker_kwargs.items() if not isinstance(settings, Mapping)]:
        raise ValueError(
            f"tracker_kwargs must hold the settings of each tracker by its name, got {flat[0]!r} beside no name: "
            f"nothing would read it. Pass tracker_kwargs={{{log_with or 'wandb'!r}: {{{flat[0]!r}: ...}}}}."
        )
    if log_with is None or log_with in ("all", *map(str, get_available_trackers())):
        needs_folder = getattr(LOGGER_TYPE_TO_CLASS.get(str(log_with)), "requires_logging_directory", False)
        if needs_folder and not (project.get("logging_dir") or project.get("project_dir")):
            raise ValueError(
                f"log_with={log_with!r} writes files, but no folder is given: there would be nowhere to log. Pass "
                "project_kwargs={'logging_dir': 'folder'}."
            )
        return
    known = [*LOGGER_TYPE_TO_CLASS]
    if log_with not in known:
        raise ValueError(
            f"log_with must be one of {', '.join(known)}, or None, got {log_with!r}: nothing would be logged."
        )
    if log_with in LoggerType.list():
        raise ValueError(
            f"log_with={log_with!r} needs a package that is not installed here: nothing would be logged. "
            f"`pip install {log_with.replace('_', '-')}`, or use log_with=None."
        )


class Trackers:
    """The trackers that `PPOConfig.log_with` names.

    Args:
        config: Names the trackers; its settings, without secrets, are logged as those of the run.
    """

    def __init__(self, accelerator: Accelerator, config: PPOConfig) -> None:
        self.accelerator, self.config = accelerator, config
        self.step = 0
        """Last step that was logged."""
        self._has_begun = config.log_with is None
        self._resumed_state: dict[str, Any] = {}

    def begin(self) -> None:
        """Start the trackers, or continue the runs of a loaded checkpoint; later calls do nothing.

        Weights & Biases and trackio continue the saved run. TensorBoard hides what the interrupted run wrote after
        its checkpoint.
        """
        if self._has_begun:
            return
        self._has_begun = True
        config = redacted(self.config.to_dict())
        flat = {name: value for name, value in config.items() if isinstance(value, int | float | str)}
        arguments: Any = {name: dict(settings) for name, settings in self._tracker_kwargs().items()}
        for tracker, name in RUN_NAMES.items():
            if run := self._resumed_state.get(tracker):
                arguments[tracker] = {"resume": "allow", **arguments.get(tracker, {}), name: run}
        if self._resumed_state and self.config.log_with == "tensorboard":
            purge = {"purge_step": int(self._resumed_state["step"]) + 1}
            arguments["tensorboard"] = purge | arguments.get("tensorboard", {})
        self.accelerator.init_trackers(self.config.tracker_project_name, config=flat, init_kwargs=arguments)

    def begin_when_used(self) -> None:
        """Let `log` and `get_tracker` of the accelerator begin first: a script may call them itself."""

        def begun(method: Callable[..., Any]) -> Callable[..., Any]:
            @wraps(method)
            def call(*args: Any, **kwargs: Any) -> Any:
                self.begin()
                return method(*args, **kwargs)

            return call

        for name in ("log", "get_tracker"):
            setattr(self.accelerator, name, begun(getattr(self.accelerator, name)))

    def log(self, values: Mapping[str, Any], step: int, *, own_rows: bool = True) -> None:
        """Log the values of one step; TensorBoard shows NumPy arrays as histograms.

        Args:
            step: Their place on the axis.
            own_rows: Whether nobody else logs to the tracker. False leaves the step to Weights & Biases, which drops a
                row whose step lies behind one that the script has logged.
        """
        self.begin()
        self.step = step
        values = dict(values)
        if self.config.log_with == "tensorboard":
            # Accelerate's writer takes numbers and texts; distributions go to the writer itself.
            arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
            writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
            for name, value in arrays.items():
                if value.size:
                    writer.add_histogram(name, value, step)
            values = {name: value for name, value in values.items() if name not in arrays}
        has_step = own_rows or self.config.log_with != "wandb"  # without one, MLflow writes everything to step 0
        self.accelerator.log(values, step=step if has_step else None)

    def state_dict(self) -> dict[str, Any]:
        """The id of the Weights & Biases run and the name of the trackio run, or None, and the last step."""
        runs = {tracker: self._resumed_state.get(tracker) for tracker in RUN_NAMES}
        if self._has_begun and self.config.log_with in RUN_NAMES and self.accelerator.is_main_process:
            run = self.accelerator.get_tracker(self.config.log_with, unwrap=True)
            runs[self.config.log_with] = getattr(run, RUN_NAMES[self.config.log_with], None)
        return runs | {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let `begin` continue the saved runs; after `begin` there is a warning that they are not continued."""
        saved = state.get(str(self.config.log_with))
        if self._has_begun and saved and saved != self.state_dict()[str(self.config.log_with)]:
            warnings.warn(
                f"The {self.config.log_with} run {saved!r} of the checkpoint is not continued: a new run had begun "
                "before (by generate, step or a `dataset` of rows). Resume first, then sample.", UserWarning,
                stacklevel=2,
            )  # fmt: skip
        self._resumed_state, self.step = dict(state), int(state["step"])

    def _tracker_kwargs(self) -> dict[str, Any]:
        settings = self.config.tracker_kwargs
        return settings if isinstance(settings, dict) else {}
