"""One process is handed what it must refuse; run under torchrun, each process writes down what it was told."""

import json
import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.rewards.sources import RewardFailures
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

QUERIES, RESPONSES = [torch.tensor([5, 6]), torch.tensor([7])], [torch.tensor([8, 9]), torch.tensor([10])]


class Recorder:
    """A reward source that remembers what it was asked."""

    def __init__(self, *, fails: int = 0) -> None:
        self.fails, self.calls = fails, []  # type: int, list[list[str]]

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float | None]:
        self.calls.append(prompts)
        if len(self.calls) <= self.fails:
            raise OSError("no route")
        return [None, *(float(len(response)) for response in responses[1:])]


def says_good(responses: list[str]) -> list[Any]:
    return ["good"] * len(responses)


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(n_layer=1, n_embd=8, n_head=1))
    config = PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1, most_skips_in_a_row=2, dump_dir=str(folder))
    prompts = PromptDataset.from_texts(["The movie", "I", "We", "This"], tokenizer)
    trainer = PPOTrainer(config, model, tokenizer=tokenizer, dataset=prompts)
    rank = trainer.accelerator.process_index
    said: dict[str, Any] = {}

    def note(name: str, call: Callable[[], object]) -> None:
        try:
            call()
            said[name] = "accepted"
        except (ValueError, TypeError, FloatingPointError, RuntimeError) as error:
            said[name] = f"{type(error).__name__}: {error}"
        parameters = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
        said[f"{name}, weights"] = float(parameters.double().abs().sum())

    def step(first: float) -> Callable[[], object]:
        return lambda: trainer.step(QUERIES, RESPONSES, [torch.tensor(first), torch.tensor(-1.0)])

    def train(source: Any, **settings: Any) -> Callable[[], object]:
        sampling = SamplingConfig(max_new_tokens=3)
        return lambda: trainer.train(source, TrainConfig(iterations=1, sampling=sampling, progress=False, **settings))

    def fails_on_the_second(responses: list[str]) -> list[float]:
        if rank == 1:
            raise OSError("no route")
        return [1.0] * len(responses)

    note("start", lambda: None)
    note("nan on process 1", step(math.nan if rank == 1 else 1.0))
    note("reward fails on process 1", train(fails_on_the_second))
    note("overflow on process 1, first", step(1e30 if rank == 1 else 1.0))
    note("overflow on process 1, second", step(1e30 if rank == 1 else 1.0))
    note("good", step(1.0))
    drop = RewardFailures(on_failure="drop", backoff=0.0)
    note("reward drops on process 1", train(fails_on_the_second, reward_failures=drop))
    asked, patient = Recorder(), Recorder(fails=1)
    note("asked once", train(asked, reward_calls="once"))
    again = RewardFailures(attempts=2, backoff=0.0)
    note("asked once, in vain at first", train(patient, reward_calls="once", reward_failures=again))
    note("asked once, nonsense", train(says_good, reward_calls="once"))
    note("asked once, dropped", train(says_good, reward_calls="once", reward_failures=drop))
    said |= {"asked": asked.calls, "patient": patient.calls}
    (folder / f"{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
