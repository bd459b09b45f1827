"""Accelerate's trackers: begun once, told no secrets, and continued by a run that is resumed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from accelerate import Accelerator

from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.utils.redaction import redacted


class Trackers:
    """The trackers that `PPOConfig.log_with` names.

    Args:
        accelerator: Has them.
        config: Names them; its settings are what they show of the run.
    """

    def __init__(self, accelerator: Accelerator, config: PPOConfig) -> None:
        self.accelerator, self.config = accelerator, config
        self.step = 0
        """Newest step that was logged."""
        self._begun = config.log_with is None
        self._before: dict[str, Any] = {}

    def begin(self) -> None:
        """Start them, or the runs of the checkpoint again; later calls do nothing.

        Weights & Biases goes on in the run of that id. TensorBoard passes over what the interrupted run wrote after
        its checkpoint.
        """
        if self._begun:
            return
        self._begun = True
        settings = redacted(self.config.to_dict())
        flat = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
        arguments: Any = {name: dict(wishes) for name, wishes in dict(self._wishes()).items()}
        if self._before.get("wandb"):
            arguments["wandb"] = {"resume": "allow", **arguments.get("wandb", {}), "id": self._before["wandb"]}
        if self._before and self.config.log_with == "tensorboard":
            again = {"purge_step": int(self._before["step"]) + 1}
            arguments["tensorboard"] = again | arguments.get("tensorboard", {})
        self.accelerator.init_trackers(self.config.tracker_project_name, config=flat, init_kwargs=arguments)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send one step's values; NumPy arrays are distributions, which TensorBoard shows as histograms."""
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
        self.accelerator.log(values, step=step)

    def state_dict(self) -> dict[str, Any]:
        """The id of the run, where the tracker gives one, and the newest step."""
        ours = self._begun and self.config.log_with == "wandb" and self.accelerator.is_main_process
        run = self.accelerator.get_tracker("wandb", unwrap=True) if ours else None
        return {"wandb": getattr(run, "id", None) or self._before.get("wandb"), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let `begin` go on with these runs; without effect on trackers that have begun."""
        self._before, self.step = {"wandb": state["wandb"], "step": int(state["step"])}, int(state["step"])

    def _wishes(self) -> dict[str, Any]:
        wishes = self.config.tracker_kwargs
        return wishes if isinstance(wishes, dict) else {}
