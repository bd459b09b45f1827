"""Held-out evaluations: names that would fail at the first one, judges beside an environment, episodes that fail."""

from dataclasses import replace
from typing import Any

import datasets
import pytest

from rlhf_ppo import GRPO
from rlhf_ppo.diagnostics.guards import Guard, Guards
from rlhf_ppo.environments import Turn
from rlhf_ppo.rollout.prompts import PromptDataset
from tests.support.games import CountE
from tests.support.tiny_run import SAMPLING, TEXTS, config, parameters, share_of_e, trainer


@pytest.mark.parametrize("name", ["score", "kl", "kl_k3", "reference_nll", "length"])
def test_a_judge_with_the_name_of_a_measure_is_refused(name: str) -> None:
    own = trainer()
    with pytest.raises(ValueError, match=f"expected judges with names of their own, got '{name}'"):
        own.evaluate(own.dataset, share_of_e, SAMPLING, judges={name: share_of_e})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_best": "scores"}, r"keep_best is 'scores', the evaluation has \['score', 'judge', 'kl', .*'length'\]"),
        ({"guards": Guards(judge_name="jugde")}, r"Guards.judge_name is 'jugde', the judges are \['judge'\]"),
    ],
)
def test_names_that_the_evaluation_will_not_have_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    own = trainer()
    arguments = {"eval_prompts": own.dataset, "judges": {"judge": share_of_e}}
    with pytest.raises(ValueError, match=message):
        own.train(share_of_e, config(eval_every=1, **settings), **arguments)
    assert own.optimizer.state == {}


@pytest.mark.parametrize("copies", [1, 3])
def test_an_evaluation_needs_neither_the_groups_of_training_nor_a_temperature_to_be_greedy(copies: int) -> None:
    own = trainer(algorithm=GRPO(), temperature=0.7)
    greedy = replace(SAMPLING, do_sample=False, num_return_sequences=copies)
    evaluation = own.evaluate(own.dataset, share_of_e, greedy)  # type: ignore[arg-type]
    assert len(evaluation.responses) == len(TEXTS)
    with pytest.raises(ValueError, match="set num_return_sequences to 2 or more"):
        own.train(share_of_e, replace(config(), sampling=replace(SAMPLING, temperature=0.7)))
    assert own.optimizer.state == {}


def test_fewer_held_out_prompts_than_processes_are_refused_at_once() -> None:
    own = trainer()
    own.accelerator.state.num_processes = 2
    try:
        with pytest.raises(ValueError, match="2 processes share 1 held-out prompts"):
            own.train(share_of_e, config(eval_every=1), eval_prompts=PromptDataset.from_texts(TEXTS[:1], own.tokenizer))
    finally:
        own.accelerator.state.num_processes = 1
    assert own.optimizer.state == {}


def test_numbers_of_an_environment_are_no_judges() -> None:
    """`segments` is always 1: taken for a judge, it would make every gain of the score a lead."""
    state = trainer().train(None, config(iterations=1, eval_every=1), prompts=4, eval_prompts=4, environment=CountE)
    assert state.evaluation is not None
    assert "segments" in state.evaluation.measures
    assert "guard/judge_lead" not in state.metrics


class FailsWhenHeldOut(CountE):
    """An environment that works in training: only held-out rows name it."""

    def reset(self, prompt: str = "The movie", held_out: bool = False) -> str:
        self.held_out = held_out
        return super().reset(prompt)

    def step(self, reply: str) -> Turn:
        if self.held_out:
            raise OSError("no route")
        return super().step(reply)


@pytest.mark.filterwarnings("ignore:.*no route")
def test_an_evaluation_whose_episodes_all_fail_does_not_end_the_run() -> None:
    own = trainer()
    held_out = PromptDataset(
        datasets.Dataset.from_dict({"prompt": TEXTS, "held_out": [True] * len(TEXTS)}), own.tokenizer
    )
    settings = config(iterations=2, eval_every=1, keep_best="score", guards=Guards(judge=Guard(limit=5.0)))
    state = own.train(None, settings, eval_prompts=held_out, judges={"judge": share_of_e}, environment=FailsWhenHeldOut)
    assert (state.iteration, state.stopped, state.best) == (2, None, None)
    assert state.evaluation is not None
    assert state.evaluation.responses == []
    assert parameters(own).isfinite().all()
