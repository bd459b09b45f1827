"""The reasoning recipe: its problems, the teacher's solutions, and a tiny run."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from ppo_reasoning import Config, main

from games.sums import Expressions, Sums, make_tokenizer, worked


def test_a_sum_is_worked_out_from_left_to_right() -> None:
    assert worked("12+7-15") == "19-15=4"
    assert worked("3-20+1=") == "-17+1=-16"
    assert worked("5") == "5"


def test_the_teacher_slips_in_the_share_of_steps_that_is_asked_for() -> None:
    """Two steps, each right with probability 0.7, and slips that cancel out in 1 of 10 pairs: 0.49 + 0.09 / 10."""
    generator, problems = random.Random(0), Sums(size=4000, seed=1)
    right = [
        problems.score_answer(worked(row["question"], generator, 0.3).rpartition("=")[2], row)
        for row in map(problems.__getitem__, range(len(problems)))
    ]
    assert sum(right) / len(right) == pytest.approx(0.499, abs=0.03)


def test_the_built_in_problems_have_the_answers_of_python_and_tokens_for_all_they_say() -> None:
    tokenizer, problems = make_tokenizer(), Expressions(Sums(size=50, seed=0))
    for index in range(len(problems)):
        row = problems[index]
        assert int(row["answer"]) == eval(row["question"][:-1])
        text = row["question"] + worked(row["question"])
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


class ChainSum:
    """The interface of reasoning-gym's chain_sum."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = f"State the final answer to the following arithmetic problem: 4 - {index} + 11 ="
        return {"question": text, "answer": str(15 - index), "metadata": {}}

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        return float(answer == entry["answer"])


def test_problems_of_reasoning_gym_are_asked_without_their_words() -> None:
    assert Expressions(ChainSum())[3]["question"] == "4-3+11="

    class Words(ChainSum):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"question": "How many legs have 4 cats?", "answer": "16"}

    with pytest.raises(ValueError, match="chain_sum"):
        Expressions(Words())[0]


def test_without_reasoning_gym_its_families_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(SystemExit, match="pip install reasoning-gym"):
        main(Config(family="chain_sum"))


def test_a_tiny_run_writes_its_metrics_and_results(tmp_path: Path) -> None:
    config = Config(
        tokens=1, batch_size=8, mini_batch_size=4, transcripts=64, problems=20, eval_problems=10, k=2,
        output_dir=str(tmp_path),
    )  # fmt: skip
    result = main(config)
    assert 0 <= result["after/accuracy"] <= result["after/pass@2"] <= 1
    assert json.loads((tmp_path / "result.json").read_text()) == result
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["env/failed"] == row["env/token_drift"] == 0
