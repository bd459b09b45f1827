"""Trains a tiny reward model under torchrun and writes losses, gradients, metrics and weights to a file."""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from reward_model import train_reward_model
from reward_model.data.comparisons import as_comparisons
from tests.reward_model.conftest import preference_rows, tiny_config


class Recorder(TrainerCallback):
    """Keeps the gradient of every optimizer step and what is logged."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []
        self.losses: list[float] = []
        self.metrics: dict[str, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
        names = ("accuracy", "margin", "num_tokens", "eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward")
        self.metrics |= {f"{name} {state.global_step}": logs[name] for name in names if name in logs}


def main(base: str, output: str, micro_batch_size: int, count: int) -> None:
    rows = preference_rows(count + 33)
    for index, row in enumerate(rows):  # weights and ties make a mean of means differ from the mean
        row["weight"] = [0.5, 1.0, 4.0][index % 3]
        row["tie"] = index % 5 == 0
    recorder = Recorder()
    config = tiny_config(
        Path(base), Path(output), batch_size=16, micro_batch_size=micro_batch_size, log_every=1, centering=0.01,
        evaluations=2, learning_rate=1e-4,
    )  # fmt: skip
    comparisons = as_comparisons(rows, "rows")
    trained = train_reward_model(
        config, train=comparisons[:count], evaluation=comparisons[count:], callbacks=[recorder]
    )
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    content = {
        "gradients": recorder.gradients, "losses": recorder.losses, "logged": recorder.metrics,
        "metrics": trained.metrics, "weights": load_file(trained.path / "model.safetensors"),
    }  # fmt: skip
    torch.save(content, f"{output}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
