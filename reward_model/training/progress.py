"""A progress bar for the training run that shows the last loss and accuracy."""

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from rlhf_ppo.utils.progress import ProgressBar

_SHOWN = ("loss", "accuracy", "eval_accuracy")


class ProgressBarCallback(ProgressCallback):
    """The Trainer's progress bar, with the metrics behind it instead of printed above it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current_step = state.global_step  # of a resumed run
        if state.is_world_process_zero:
            self.training_bar: Any = ProgressBar(
                total=state.max_steps, initial=state.global_step, desc="Reward model", unit="step"
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Show the last metrics; the Trainer would print them as a dict."""
        shown = {name: f"{float(logs[name]):.3f}" for name in _SHOWN if name in (logs or {})}
        if self.training_bar is not None and shown:  # the last log has the run's time alone
            self.training_bar.set_postfix(shown)
