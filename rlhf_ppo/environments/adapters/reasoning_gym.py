"""Problems of reasoning-gym: one turn, scored by the data set."""

import re
from collections.abc import Callable
from typing import Any

from rlhf_ppo.environments.base import EnvironmentFactory, Observation, Turn

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def last_answer(reply: str) -> str:
    """What stands in the last `<answer>...</answer>` of a reply; the whole reply where there is none."""
    found: list[str] = _ANSWER.findall(reply)
    return (found or [reply])[-1].strip()


def from_reasoning_gym(
    dataset: Any, *, system: str | None = None, answer_of: Callable[[str], str] = last_answer, chat: bool = True
) -> EnvironmentFactory:
    """Problems of a data set of reasoning-gym, scored by its `score_answer`.

        environment = from_reasoning_gym(reasoning_gym.create_dataset("chain_sum", size=1000, seed=0))
        trainer.evaluate(PromptDataset.from_list([{"prompt": "", "index": i} for i in range(100)], ...), ...)

    Args:
        dataset: The data set. The column `index` chooses the problem; without it, the episode's seed does.
        system: A system message before the problem, or text before it where `chat` is False.
        answer_of: Takes the answer out of a reply.
        chat: Whether the problem is the message of a user, rendered by the chat template; otherwise it is the prompt as
            it is.
    """

    class ReasoningGymEnvironment:
        def reset(self, seed: int, index: int | None = None) -> Observation:
            self.problem = dataset[seed % len(dataset) if index is None else int(index)]
            question = str(self.problem["question"])
            if not chat:
                return (system or "") + question
            before = [] if system is None else [{"role": "system", "content": system}]
            return [*before, {"role": "user", "content": question}]

        def step(self, reply: str) -> Turn:
            score = float(dataset.score_answer(answer_of(reply), self.problem))
            return Turn(reward=score, terminated=True, info={"solved": float(score >= 1.0)})

    return ReasoningGymEnvironment
