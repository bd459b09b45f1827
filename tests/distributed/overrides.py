"""One step of trainers with an overridden method; run under torchrun, each process saves its weights."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

QUERIES = [torch.tensor(tokens) for tokens in ([5, 6], [7], [8, 9, 10], [11])]
RESPONSES = [torch.tensor(tokens) for tokens in ([20, 21], [22, 23], [24, 25], [26, 27])]
SCORES = [torch.tensor(score) for score in (1.0, -1.0, 0.5, 2.0)]


class CallsSuper(PPOTrainer):
    """Overrides a method and changes nothing."""

    def compute_rewards(self, *args: Any) -> Any:
        return super().compute_rewards(*args)


class Skewed(PPOTrainer):
    """On process 0, all ratios are 12, which is more than the threshold; on the others, 1."""

    def train_minibatch(self, old_logprobs: Any, *args: Any) -> Any:
        shift = math.log(12.0) if self.accelerator.is_main_process else 0.0
        return super().train_minibatch(old_logprobs - shift, *args)


def step(cls: type[PPOTrainer], rows: slice, size: int) -> torch.Tensor:
    """The weights after a step of SGD on some of the rows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    config = PPOConfig(batch_size=size, mini_batch_size=size, ppo_epochs=1, diagnose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    trainer = cls(config, model, None, tiny_tokenizer(), optimizer=optimizer)
    trainer.step(QUERIES[rows], RESPONSES[rows], SCORES[rows])
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    for cls in (CallsSuper, Skewed):
        torch.save(step(cls, slice(2 * rank, 2 * rank + 2), 2), folder / f"{cls.__name__}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
