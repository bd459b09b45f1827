"""`PreferenceTrainer`: trl's RewardTrainer with further losses, and batches of similar length."""

from contextlib import nullcontext
from typing import Any

import torch
from trl.trainer.reward_trainer import RewardTrainer

from reward_model.backbone import layers_of
from reward_model.config import RewardModelConfig
from reward_model.encoding import LengthGroupedBatches
from reward_model.losses import (
    bradley_terry_loss,
    centering_penalty,
    davidson_loss,
    plackett_luce_loss,
    weighted_mean,
)
from rlhf_ppo.kernels.linear_layers import use_fast_layers, use_plain_layers
from rlhf_ppo.kernels.packing import can_be_packed
from rlhf_ppo.kernels.unpadded import unpadded


class PreferenceTrainer(RewardTrainer):
    """trl's RewardTrainer with weights, soft labels, ties and rankings; a step's loss is one weighted mean.

    The mean runs over all comparisons of an optimizer step, whatever the number of processes and micro-batches.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *, settings: RewardModelConfig, has_ties: bool, **options: Any) -> None:
        """Set up trl's trainer.

        Args:
            settings: Configuration of the run.
            has_ties: Whether training pairs hold ties, which need the Davidson model.
            **options: Arguments of trl.RewardTrainer; the datasets must be encoded.
        """
        self.settings = settings
        self.has_ties = has_ties
        super().__init__(**options)
        self._layers: Any = layers_of(self.model)
        self._is_packed = (
            settings.packing and not settings.gradient_checkpointing and self._on_cpu() and self._can_pack()
        )

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Trl's `train`; on a CPU with faster layers, which are replaced by the plain ones at the end."""
        model: Any = self.model
        if self.settings.fast_products and self._on_cpu():
            use_fast_layers(model)
        try:
            return super().train(*arguments, **options)
        finally:
            use_plain_layers(model)

    def _on_cpu(self) -> bool:
        """Whether this is training on a CPU without DeepSpeed or FSDP, where packing and fast layers apply."""
        return self.accelerator.device.type == "cpu" and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _can_pack(self) -> bool:
        dataset: Any = self.train_dataset
        return can_be_packed(self._layers, [torch.tensor(dataset[0][name]) for name in ("chosen_ids", "rejected_ids")])

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedBatches:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return LengthGroupedBatches(dataset["length"], batch_size=self.settings.batch_size, seed=self.settings.seed)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Total weight of the comparisons of an optimizer step, over micro-batches and processes."""
        local = torch.stack([batch["weight"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.reduce(local, reduction="sum")  # type: ignore[no-any-return]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This process's part of the step's weighted mean loss, times the number of processes, as DDP averages."""
        mode = "train" if model.training else "eval"
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        with unpadded(self._layers) if self._is_packed else nullcontext():
            outputs = model(input_ids=ids, attention_mask=mask, use_cache=False)
        scores = outputs.logits.squeeze(-1).float()
        losses = self.losses(scores, inputs)
        loss = weighted_mean(losses, inputs["weight"], num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        self._record(mode, scores.detach(), inputs)
        return (loss, outputs) if return_outputs else loss

    def losses(self, scores: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """One loss per comparison, [comparisons]."""
        settings = self.settings
        if "groups" in inputs:
            mask = inputs["groups"] >= 0
            grouped = scores[inputs["groups"].clamp(min=0)]
            losses = plackett_luce_loss(grouped, inputs["ranks"], mask)
            return losses + settings.centering * centering_penalty(grouped, mask) if settings.centering else losses
        chosen, rejected = scores[: 2 * len(inputs["tie"])].chunk(2)
        labels = {
            "margin": inputs["margin"] * settings.margin_scale,
            "preference": inputs["preference"],
            "label_smoothing": settings.label_smoothing,
        }
        if self.has_ties:
            losses = davidson_loss(chosen, rejected, inputs["tie"], tie_strength=settings.tie_strength, **labels)
        else:
            losses = bradley_terry_loss(chosen, rejected, **labels)
        if settings.centering:
            pairs = torch.stack((chosen, rejected), dim=1)
            losses = losses + settings.centering * centering_penalty(pairs, torch.ones_like(pairs, dtype=torch.bool))
        return losses

    def _record(self, mode: str, scores: torch.Tensor, inputs: dict[str, Any]) -> None:
        """Record trl's metrics: accuracy and margin of best against worst, mean reward, number of tokens."""
        gather = self.accelerator.gather_for_metrics
        chosen, rejected = scores[: 2 * len(inputs["tie"])].chunk(2)
        difference = gather((chosen - rejected).contiguous())
        tie = gather(inputs["tie"])
        decided = difference[~tie] if (~tie).any() else difference
        metrics = self._metrics[mode]
        metrics["accuracy"].append((decided > 0).float().mean().item())
        metrics["margin"].append(decided.mean().item())
        metrics["mean_reward"].append(self.accelerator.gather(scores.mean()).mean().item())
        tokens = gather(inputs["attention_mask"].sum()).sum().item()
        self._total_train_tokens += tokens if mode == "train" else 0
        metrics["num_tokens"] = [self._total_train_tokens]
