"""Episodes on several processes: the same episodes as on one, unequal numbers of turns, one process whose fail."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.environments import EpisodeConfig, Turn
from rlhf_ppo.samplers.base import Sampler, Samples, SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_llama, tiny_tokenizer

EPISODES = 8
GREEDY = SamplingConfig(max_new_tokens=3, stop_token_ids=(EOS_TOKEN_ID,), do_sample=False)


class Unequal:
    """One to five turns, by the seed; pays for "e" and for the number of the turn."""

    def reset(self, seed: int) -> Any:
        self.left = 1 + seed % 5
        return f"Play {seed % 100}:"

    def step(self, reply: str) -> Turn:
        self.left -= 1
        reward = float(reply.count("e")) + 0.1 * self.left
        return Turn(f" {self.left} left:", reward=reward, terminated=self.left == 0, info={"left": self.left})


class Rewritten(Unequal):
    """The same in messages, of which the chat template shows the last alone: each turn is a row."""

    def reset(self, seed: int) -> Any:
        return [{"role": "user", "content": super().reset(seed)}]

    def step(self, reply: str) -> Turn:
        turn = super().step(reply)
        return replace(turn, observation=[{"role": "user", "content": turn.observation}])


class FailsOnProcessOne(Unequal):
    """No episode of process 1 can be played."""

    def reset(self, seed: int) -> Any:
        if PartialState().process_index == 1:
            raise OSError("process 1 has no sandbox")
        return super().reset(seed)


def counts_e(responses: Sequence[str], **_: Any) -> list[float]:
    """A judge."""
    return [float(response.count("e")) for response in responses]


class Collective(DecodeLoop):
    """A sampler that all processes must call equally often, as vLLM's client: each call is a collective."""

    def sync_weights(self, model: nn.Module, accelerator: Any) -> None:
        """It uses the live module."""

    def __call__(self, *args: Any, **kwargs: Any) -> Samples:
        assert all(gather_object([len(args[1]) > 0]))
        return super().__call__(*args, **kwargs)


def run(*, processes: int, environment: type[Unequal] = Unequal, sampler: Sampler | None = None) -> dict[str, object]:
    """Two iterations on the same eight episodes, whatever the number of processes; weights and metrics."""
    size = EPISODES // processes
    torch.manual_seed(0)  # of the value head; a Llama has no key biases, whose gradient is nothing but rounding
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_llama(seed=0))
    settings = PPOConfig(batch_size=size, mini_batch_size=size, learning_rate=1e-3, ppo_epochs=2)
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}{{ ' ->' if add_generation_prompt }}"
    own = PPOTrainer(settings, model, tokenizer=tokenizer)
    update: Any = own.algorithm.update
    update._minibatches = lambda rows: [torch.arange(rows)]  # two processes have the same rows in another order
    config = TrainConfig(iterations=2, sampling=GREEDY, progress=False, episodes=EpisodeConfig(retries=0))
    state = own.train(None, config, prompts=EPISODES, environment=environment, sampler=sampler)
    evaluation = own.evaluate(EPISODES, None, GREEDY, environment=environment, judges={"judge": counts_e})
    weights = {name: parameter.detach().clone() for name, parameter in own.model.named_parameters()}
    return {"weights": weights, "metrics": state.metrics, "measures": evaluation.measures}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    outcomes = {
        "equal": run(processes=2), "failing": run(processes=2, environment=FailsOnProcessOne),
        "collective": run(processes=2, sampler=Collective()), "segments": run(processes=2, environment=Rewritten),
    }  # fmt: skip
    for name, outcome in outcomes.items():
        torch.save(outcome, folder / f"{name}-{PartialState().process_index}.pt")
