"""The `PreferenceTrainer`: trl's RewardTrainer with further losses, exact metrics and batches of similar length."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import EvalPrediction
from trl.trainer.reward_trainer import RewardTrainer

from reward_model.models.backbone import layers_of
from reward_model.models.encoding import LengthGroupedBatches
from reward_model.training.config import RewardModelConfig
from reward_model.training.losses import (
    bradley_terry_loss,
    centering_penalty,
    davidson_loss,
    plackett_luce_loss,
    weighted_mean,
)
from rlhf_ppo.kernels.liger_layers import use_liger_layers
from rlhf_ppo.kernels.linear_layers import use_fast_layers, use_plain_layers
from rlhf_ppo.kernels.packing import packing_matches
from rlhf_ppo.kernels.unpadded import unpadded


class PreferenceTrainer(RewardTrainer):
    """trl's RewardTrainer with weights, soft labels, ties and rankings; a step's loss is one weighted mean.

    The mean runs over all comparisons of an optimizer step, and the metrics are sums divided by counts, whatever the
    number of processes and micro-batches.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *, settings: RewardModelConfig, has_ties: bool, **options: Any) -> None:
        """Set up trl's trainer.

        Args:
            has_ties: Whether training pairs hold ties, which need the Davidson model.
            **options: Arguments of trl.RewardTrainer; the datasets must be encoded.
        """
        self.settings = settings
        self.has_ties = has_ties
        super().__init__(compute_metrics=evaluation_metrics, **options)
        self._train_sums: torch.Tensor | None = None
        self._layers: Any = layers_of(self.model)
        self._is_packed = (
            settings.packing and not settings.gradient_checkpointing and self._on_cpu() and self._can_pack()
        )

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Trl's `train` with faster layers, which are replaced by the plain ones at the end."""
        model: Any = self.model
        if self.settings.fast_products and self._on_cpu():
            use_fast_layers(model)
        elif self.accelerator.device.type == "cuda" and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, torch.float32)
            use_liger_layers(model, self.accelerator.device, half)
        try:
            return super().train(*arguments, **options)
        finally:
            use_plain_layers(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Transformers' schedule; one with a warm-up is a step ahead, since the rate of its first step is 0."""
        if not self.args.warmup_steps or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        schedule = super().create_scheduler(num_training_steps + 1, optimizer)
        if isinstance(schedule, LambdaLR):
            rates: list[Callable[[int], float]] = [partial(_one_step_ahead, rate) for rate in schedule.lr_lambdas]
            self.lr_scheduler = LambdaLR(schedule.optimizer, rates)
        return self.lr_scheduler

    def _on_cpu(self) -> bool:
        """Whether this is training on a CPU without DeepSpeed or FSDP, where packing and fast layers apply."""
        return self.accelerator.device.type == "cpu" and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _can_pack(self) -> bool:
        dataset: Any = self.train_dataset
        return packing_matches(
            self._layers, [torch.tensor(dataset[0][name]) for name in ("chosen_ids", "rejected_ids")]
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedBatches:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [length for length in dataset["length"] if length]  # fillers have 0
        return LengthGroupedBatches(
            lengths, batch_size=self.settings.batch_size, seed=self.settings.seed, fillers=len(dataset) - len(lengths)
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Total weight of the comparisons of an optimizer step, over micro-batches and processes."""
        local = torch.stack([batch["weight"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.reduce(local, reduction="sum")  # type: ignore[no-any-return]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This process's part of the step's weighted mean loss, times the number of processes, as DDP averages."""
        outputs = self._forward(model, inputs)
        scores = outputs.logits.squeeze(-1).float()
        losses = self.losses(scores, inputs)
        loss = weighted_mean(losses, inputs["weight"], num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        if model.training:
            statistics = comparison_statistics(losses.detach(), scores.detach(), inputs)
            sums = statistics.to(_SUM_DTYPE.get(statistics.device.type, torch.float64)).sum(dim=0)
            self._train_sums = sums if self._train_sums is None else self._train_sums + sums
        return (loss, outputs) if return_outputs else loss

    def losses(self, scores: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """One loss per comparison, [comparisons], whatever the comparisons beside it."""
        settings = self.settings
        is_item = inputs["groups"] >= 0
        items = scores[inputs["groups"].clamp(min=0)]
        chosen, rejected = scores[: 2 * len(items)].chunk(2)
        labels = {
            "margin": inputs["margin"] * settings.margin_scale,
            "preference": inputs["preference"],
            "label_smoothing": settings.label_smoothing,
        }
        if self.has_ties:
            pairs = davidson_loss(chosen, rejected, inputs["tie"], tie_strength=settings.tie_strength, **labels)
        else:
            pairs = bradley_terry_loss(chosen, rejected, **labels)
        rankings = plackett_luce_loss(items, inputs["ranks"], is_item)
        losses = torch.where(is_item.sum(dim=1) > 2, rankings, pairs)
        return losses + settings.centering * centering_penalty(items, is_item) if settings.centering else losses

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """The statistics of held-out comparisons as predictions: transformers gathers them, each comparison once."""
        with torch.no_grad(), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(inputs)
            scores = self._forward(model, inputs).logits.squeeze(-1).float()
            statistics = comparison_statistics(self.losses(scores, inputs), scores, inputs)
        return None, statistics, statistics[:, 0]  # transformers computes metrics only where there are labels

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training log gets the metrics of the steps since the last one, over all processes."""
        if "loss" in logs and self._train_sums is not None:
            sums = self.accelerator.reduce(self._train_sums, reduction="sum")
            self._train_sums = None
            self.state.num_input_tokens_seen += int(sums[STATISTICS.index("tokens")])  # a part of checkpoints
            logs |= metrics_of_sums(sums.tolist()) | {"num_tokens": float(self.state.num_input_tokens_seen)}
        super().log(logs, start_time)

    def _forward(self, model: Any, inputs: dict[str, Any]) -> Any:
        with unpadded(self._layers) if self._is_packed else nullcontext():
            return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)


def _one_step_ahead(rate: Callable[[int], float], step: int) -> float:
    return rate(step + 1)


STATISTICS = ("loss", "weight", "right", "margin", "decided", "score", "completions", "tokens")
"""Columns of `comparison_statistics`, whose sums give the metrics."""
_SUM_DTYPE = {"mps": torch.float32}
"""The dtype of sums by device; float64 elsewhere."""


def comparison_statistics(losses: torch.Tensor, scores: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """What each comparison of a micro-batch adds to the sums of the metrics, [comparisons, STATISTICS].

    Comparisons that only fill a step add nothing. Right is 1 where best beats worst, 1/2 where they score alike.
    """
    is_item, rows = inputs["groups"] >= 0, inputs["groups"].clamp(min=0)
    tokens = inputs["attention_mask"].sum(dim=1).float()
    chosen, rejected = scores[: 2 * len(losses)].chunk(2)
    difference, decided = chosen - rejected, inputs["decided"]
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    columns = {
        "loss": losses * inputs["weight"],
        "weight": inputs["weight"],
        "right": right * decided,
        "margin": difference * decided,
        "decided": decided.float(),
        "score": torch.where(is_item, scores[rows], 0.0).sum(dim=1),
        "completions": is_item.float().sum(dim=1),
        "tokens": torch.where(is_item, tokens[rows], 0.0).sum(dim=1),
    }
    table = torch.stack([columns[name] for name in STATISTICS], dim=1)
    return torch.where(inputs["counted"][:, None], table, 0.0)


def metrics_of_sums(sums: Sequence[float]) -> dict[str, float]:
    """Loss, accuracy and margin of best against worst, and mean reward; without those that nothing was counted for."""
    total = dict(zip(STATISTICS, sums, strict=True))
    shares = {
        "loss": ("loss", "weight"),
        "accuracy": ("right", "decided"),
        "margin": ("margin", "decided"),
        "mean_reward": ("score", "completions"),
    }
    return {name: total[part] / total[count] for name, (part, count) in shares.items() if total[count]}


def evaluation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The `compute_metrics` of transformers: metrics of all held-out comparisons, from their statistics."""
    statistics: Any = prediction.predictions
    return metrics_of_sums(statistics.astype("float64").sum(axis=0).tolist())
