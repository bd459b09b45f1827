"""One progress bar for a training run, with the newest loss and accuracy behind it."""

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

_SHOWN = ("loss", "accuracy", "eval_accuracy")


class TidyProgress(ProgressCallback):
    """The Trainer's bar; numbers go behind it instead of above it."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description("Reward model")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Show the newest numbers; the Trainer would print them as a dict."""
        if self.training_bar is not None and logs:
            self.training_bar.set_postfix({name: f"{float(logs[name]):.3f}" for name in _SHOWN if name in logs})
