"""The shortest recipe: it reads on one page, trains, and leaves a run and a policy."""

from pathlib import Path

import ppo_minimal as recipe
import pytest

from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.report import RunFolder
from tests.recipes.tiny_world import save_gpt2


def test_it_trains_by_the_reward_and_saves_run_and_policy(tmp_path: Path) -> None:
    save_gpt2(tmp_path / "gpt2")
    state = recipe.main(str(tmp_path / "gpt2"), str(tmp_path / "run"), iterations=2, batch_size=8)
    assert state.iteration == 2
    rewards = [row["env/reward_mean"] for row in RunFolder.open(tmp_path / "run").metrics()]
    assert len(rewards) == 2 and all(-1 <= reward <= 1 for reward in rewards)
    AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "run" / "model"))


def test_the_reward_is_the_sentiment_of_prompt_and_response() -> None:
    good, bad = recipe.reward(["The movie was", "The movie was"], [" wonderful", " terrible"])
    assert good > 0.5 and bad < -0.4
    assert good == pytest.approx(recipe.JUDGE.polarity_scores("The movie was wonderful")["compound"])


def test_it_reads_on_one_page() -> None:
    assert len(Path(recipe.__file__).read_text(encoding="utf-8").splitlines()) <= 60
