"""The calculator recipe: a tiny run, and the transcripts that it begins with."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from ppo_tools import Config, main

from games.calculator import calculator, make_environment, make_tokenizer, problem, transcript
from rlhf_ppo.environments.live import ReplayableEnvironment
from rlhf_ppo.environments.rendering import Renderer


@pytest.mark.parametrize("calls", [0.0, 1.0])
def test_transcripts_are_what_the_policy_reads_and_writes_in_the_environment(calls: float) -> None:
    """Played again, the replies of a transcript give its tokens."""
    tokenizer, generator = make_tokenizer(), random.Random(0)
    renderer = Renderer(tokenizer)
    for _ in range(5):
        text = transcript(generator, calls=calls)
        question, *replies = [part.partition("<|end|>")[0] for part in text.split("<|assistant|>")]
        asked = question.partition("<|user|>")[2]
        environment = ReplayableEnvironment(
            make_environment(tokenizer), {"prompt": asked, "truth": str(calculator(asked)), "seed": 0}
        )
        environment.start()
        tools: Any = environment.environment
        ids = renderer.prompt(environment.first, tools.chat_template_kwargs)
        for reply in replies:
            turn = environment.step(reply)
            ids += tokenizer(reply + "<|end|>")["input_ids"]
            if not turn.terminated:
                ids += renderer.continuation(
                    environment.first, turn.observation, ids[-1], finished=True,
                    template_kwargs=tools.chat_template_kwargs,
                )  # fmt: skip
        assert tokenizer.decode(ids) == text
        assert turn.terminated
        assert turn.reward == float(replies[-1] == str(calculator(asked)))
        assert turn.info["called_tool"] == calls


def test_problems_have_the_answer_of_the_calculator_in_four_digits() -> None:
    row = problem(random.Random(0))
    left, right = map(int, row["prompt"].split("*"))
    assert row["truth"] == str(left * right) == str(calculator(row["prompt"]))
    assert len(row["truth"]) == 4


def test_a_tiny_run_writes_its_metrics_and_results(tmp_path: Path) -> None:
    config = Config(
        tokens=1, batch_size=8, mini_batch_size=4, transcripts=64, problems=16, eval_problems=8,
        output_dir=str(tmp_path),
    )  # fmt: skip
    result = main(config)
    assert 0 <= result["after/right"] <= 1
    assert json.loads((tmp_path / "result.json").read_text()) == result
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["env/failed"] == row["env/token_drift"] == 0
    assert 0 <= row["env/called_tool"] <= 1
