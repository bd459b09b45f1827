"""The doctor's checks of episodes: each finds its fault, and says nothing of a sound environment."""

from collections.abc import Sequence
from typing import Any

from rlhf_ppo import GRPO, PPOTrainer, TrainConfig
from rlhf_ppo.environments import Turn
from rlhf_ppo.samplers.base import SamplingConfig
from tests.support.games import CountE
from tests.support.tiny_run import config, trainer


def findings(environment: Any, rewards: Any = None, own: PPOTrainer | None = None, **settings: Any) -> set[str]:
    """Names of what the doctor finds in the first rollout."""
    own = own or trainer(diagnose=True)
    own.train(rewards, config(iterations=1, **settings), environment=environment)
    assert own.diagnosis is not None
    return own.diagnosis.names()


class Calculator(CountE):
    """The first reply is a call, whose result is shown; the second is the answer, which is paid."""

    def __init__(self) -> None:
        super().__init__(turns=2, answer=" result: 42.")

    def step(self, reply: str) -> Turn:
        turn = super().step(reply)
        return Turn(
            turn.observation, reward=float(self.right(reply)) if turn.terminated else 0.0, terminated=turn.terminated
        )

    def right(self, reply: str) -> bool:
        return len(reply) > 0


class ReadsTheToolAsTheAnswer(Calculator):
    def right(self, reply: str) -> bool:
        return "42" in self.answer + reply


class Deaf(CountE):
    """The same turn, whatever is said."""

    def step(self, reply: str) -> Turn:
        return Turn(super().step(reply).observation, terminated=self.played == self.turns)


class Hopeless(CountE):
    """It hears the reply, but pays nothing."""

    def step(self, reply: str) -> Turn:
        return Turn(f" {len(reply)}", terminated=super().step(reply).terminated)


def test_a_reward_that_reads_the_output_of_a_tool_as_the_answer_is_found() -> None:
    assert "reward_survives_empty_reply" in findings(ReadsTheToolAsTheAnswer)
    assert "reward_survives_empty_reply" not in findings(Calculator)


def test_a_source_that_reads_the_observations_is_found() -> None:
    def reads_all(prompts: Sequence[str], responses: Sequence[str], transcripts: Sequence[str]) -> list[float]:
        return [float(" and" in text) for text in transcripts]

    def reads_replies(prompts: Sequence[str], responses: Sequence[str], transcripts: Sequence[str]) -> list[float]:
        return [float(len(response)) for response in responses]

    assert "source_reads_observations" in findings(CountE, reads_all)
    assert "source_reads_observations" not in findings(CountE, reads_replies)


def test_scores_at_the_tokens_of_an_observation_are_found() -> None:
    """Training drops them: replies have six tokens here, and the next one is the environment's."""

    def scores_token(position: int) -> Any:
        return lambda prompts, responses: [{position: 1.0} for _ in prompts]

    assert "masked_scores" in findings(CountE, scores_token(6))
    assert "masked_scores" not in findings(CountE, scores_token(0))


def test_an_environment_that_does_not_react_is_found() -> None:
    assert "dead_environment" in findings(Deaf)
    assert "dead_environment" not in findings(CountE)


def test_groups_whose_scores_are_all_equal_are_found() -> None:
    own = trainer(algorithm=GRPO(), batch_size=16, diagnose=True)
    sampling = SamplingConfig(max_new_tokens=2, num_return_sequences=2)
    own.train(None, TrainConfig(iterations=1, sampling=sampling, progress=False), environment=Hopeless)
    assert own.diagnosis is not None
    assert "groups_without_variance" in own.diagnosis.names()
