"""Accelerate's trackers: started once, without secrets, and continued by a resumed run."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from accelerate import Accelerator

from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.utils.redaction import redacted


class Trackers:
    """The trackers that `PPOConfig.log_with` names.

    Args:
        accelerator: Creates the trackers.
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

        Weights & Biases continues the run with the saved id. TensorBoard hides what the interrupted run wrote after its
        checkpoint.
        """
        if self._has_begun:
            return
        self._has_begun = True
        config = redacted(self.config.to_dict())
        flat = {name: value for name, value in config.items() if isinstance(value, int | float | str)}
        arguments: Any = {name: dict(settings) for name, settings in self._tracker_kwargs().items()}
        if self._resumed_state.get("wandb"):
            arguments["wandb"] = {"resume": "allow", **arguments.get("wandb", {}), "id": self._resumed_state["wandb"]}
        if self._resumed_state and self.config.log_with == "tensorboard":
            purge = {"purge_step": int(self._resumed_state["step"]) + 1}
            arguments["tensorboard"] = purge | arguments.get("tensorboard", {})
        self.accelerator.init_trackers(self.config.tracker_project_name, config=flat, init_kwargs=arguments)

    def log(self, values: Mapping[str, Any], step: int, *, own_rows: bool = True) -> None:
        """Log the values of one step; TensorBoard shows NumPy arrays as histograms.

        Args:
            values: Numbers, texts, arrays.
            step: Their place on the axis.
            own_rows: Whether nobody else logs to the tracker. False leaves the step to it (TensorBoard excepted):
                Weights & Biases drops a row whose step lies behind one that the script has logged.
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
        has_step = own_rows or self.config.log_with == "tensorboard"
        self.accelerator.log(values, step=step if has_step else None)

    def state_dict(self) -> dict[str, Any]:
        """The id of the Weights & Biases run, or None, and the last step."""
        is_wandb_main = self._has_begun and self.config.log_with == "wandb" and self.accelerator.is_main_process
        run = self.accelerator.get_tracker("wandb", unwrap=True) if is_wandb_main else None
        return {"wandb": getattr(run, "id", None) or self._resumed_state.get("wandb"), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let `begin` continue the saved runs; no effect after `begin`."""
        self._resumed_state, self.step = {"wandb": state["wandb"], "step": int(state["step"])}, int(state["step"])

    def _tracker_kwargs(self) -> dict[str, Any]:
        settings = self.config.tracker_kwargs
        return settings if isinstance(settings, dict) else {}
