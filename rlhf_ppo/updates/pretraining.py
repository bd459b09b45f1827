"""Mix gradients of the language-modeling loss into every optimizer step (PPO-ptx)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ppo.batch import TokenInputs, TrainBatch
from rlhf_ppo.updates.minibatch import MinibatchConfig, MinibatchUpdate
from rlhf_ppo.updates.objective import Masked, Metrics, Objective, Update, UpdateRecord


@dataclass(frozen=True, kw_only=True)
class PretrainingMix:
    """Texts whose likelihood is learned beside the reward (PPO-ptx; Ouyang et al. 2022, eq. 2).

        objective + γ E_{x ~ D}[log π_θ(x)]

    Raises:
        ValueError: There is no text, or a setting without meaning.
    """

    texts: Sequence[Tensor]
    """D: token ids of each text, Long [n >= 2]; the first token is given, the others are learned."""
    coef: float = 27.8
    """γ, the weight of the mean log-likelihood of a token; 27.8 in InstructGPT."""
    rows: int = 8
    """Texts per optimizer step, over all processes."""

    def __post_init__(self) -> None:
        wrong = [
            index
            for index, text in enumerate(self.texts)
            if text.is_floating_point() or text.dim() != 1 or len(text) < 2
        ]
        if not len(self.texts) or wrong or self.rows < 1 or self.coef < 0:
            raise ValueError(
                f"expected texts of at least two token ids each, rows >= 1 and coef >= 0, got {len(self.texts)} texts "
                f"(others: {wrong[:3]}), rows={self.rows}, coef={self.coef}: there would be nothing to learn. Pass "
                "one 1-D tensor of token ids per text."
            )


class PretrainingRows:
    """Draws the texts of each optimizer step, in a new seeded order each pass, equal on all processes."""

    def __init__(self, mix: PretrainingMix, seed: int) -> None:
        self.mix, self.seed = mix, seed
        self.position = 0
        """Number of texts drawn so far; the only state."""

    def __call__(self, processes: int) -> tuple[list[list[Tensor]], int]:
        """The next texts of each process, and the number of learned tokens of all processes."""
        count, drawn = len(self.mix.texts), range(self.position, self.position + self.mix.rows)
        epochs = {position // count for position in drawn}
        orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(count) for epoch in epochs}
        texts = [self.mix.texts[int(orders[position // count][position % count])] for position in drawn]
        self.position = drawn.stop
        return [texts[process::processes] for process in range(processes)], sum(len(text) - 1 for text in texts)


class PretrainingGradients:
    """Computes the gradients of an optimizer step after those of γ times the loss on pretraining texts, which add up.

    Args:
        update: The update whose gradients are mixed; its own are computed as before.
    """

    def __init__(self, update: MinibatchUpdate, rows: PretrainingRows) -> None:
        self.update, self.rows, self.inner = update, rows, update.compute_gradients

    def __call__(self, objective: Objective, batch: TrainBatch, rows: Tensor) -> tuple[Metrics, list[Masked]]:
        """Accumulate both gradients; the metrics are those of the update and `loss/pretraining`."""
        loss = self._accumulate(batch.mask.device)
        metrics, ratios = self.inner(objective, batch, rows)
        return metrics | {"loss/pretraining": loss}, ratios

    def _accumulate(self, device: torch.device) -> Tensor:
        update, accelerator = self.update, self.update.accelerator
        all_texts, tokens = self.rows(accelerator.num_processes)
        total = torch.zeros((), device=device)
        texts = all_texts[accelerator.process_index]
        for rows in passes_of_all(all_texts, update.config)[accelerator.process_index]:
            part = [texts[row] for row in rows.tolist()]
            with update.steps.micro_batch(last=False):
                output = update.policy(_as_inputs(part, device))
                loss = -output.logprobs.sum() / tokens  # 0 beyond the end of a text
                # Gradients are averaged over processes; DDP waits for one of the value head.
                scale = self.rows.mix.coef * accelerator.num_processes
                update.steps.backward(scale * loss + 0.0 * output.values.sum())
            total += loss.detach()
        reduced: Tensor = accelerator.reduce(total, reduction="sum")
        return reduced


class UpdateWithPretraining:
    """Wraps an update whose optimizer steps mix in pretraining texts, and saves which texts come next."""

    def __init__(self, update: Update, rows: PretrainingRows) -> None:
        self.inner, self.rows = update, rows

    def __call__(self, batch: TrainBatch) -> UpdateRecord:
        return self.inner(batch)

    def state_dict(self) -> dict[str, Any]:
        """State of the update, and the number of texts drawn."""
        return {"update": self.inner.state_dict(), "texts": self.rows.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["update"])
        self.rows.position = int(state["texts"])


def passes_of_all(all_texts: list[list[Tensor]], config: MinibatchConfig) -> list[list[Tensor]]:
    """Positions of the texts of each pass, by process: equally many passes, because with sharded weights all take part.

    Args:
        all_texts: Equally many of each process.
    """
    costs = [torch.tensor([len(text) for text in texts], dtype=torch.long) for texts in all_texts]
    passes = [config.micro_batches(cost) for cost in costs]
    for own in passes:
        while len(own) < max(map(len, passes)):  # then one of them has two texts
            largest = max(range(len(own)), key=lambda index: len(own[index]))
            own[largest : largest + 1] = own[largest].tensor_split(2)
    return passes


def _as_inputs(texts: Sequence[Tensor], device: torch.device) -> TokenInputs:
    """Texts as inputs of the policy: the first token as prompt, the others as response."""
    moved = [text.long().to(device) for text in texts]
    return TokenInputs(prompts=[text[:1] for text in moved], responses=[text[1:] for text in moved])
