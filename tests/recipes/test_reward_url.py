"""`--reward-url`: PPO asks a reward server and gets the scores of the model behind it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from reward_model import RewardModel
from sentiment import rewards
from sentiment.reviews import load_reviews, split_reviews
from tests.reward_model.conftest import serving


@pytest.fixture
def url(world: Path) -> Iterator[str]:
    """A real server on a free loopback port."""
    with serving(RewardModel.from_pretrained(world / "reward_model"), token="secret") as address:
        yield address


def test_a_reward_server_gives_the_scores_of_its_model(world: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_MODEL_TOKEN", "secret")
    parts = split_reviews(load_reviews(str(world / "reviews.csv")))
    rewards.check_reward_source(url)
    remote, line = rewards.reward_source(url, parts)
    local = RewardModel.from_pretrained(world / "reward_model")
    prompts, responses = ["This film"] * 3, [" was great", " was bad", " was long"]
    assert remote(prompts=prompts, responses=responses) == pytest.approx(local(prompts, responses), abs=1e-5)
    assert url in line
