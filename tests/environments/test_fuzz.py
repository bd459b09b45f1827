"""Random episodes: empty replies and observations, template marks in text, single tokens, limits met everywhere."""

import random
import warnings
from typing import Any

import pytest
import torch

from rlhf_ppo.environments import EnvironmentSampler, Episode, EpisodeConfig, Turn
from rlhf_ppo.samplers.base import Samples, SamplingConfig
from tests.support.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE, tiny_tokenizer

PIECES = [
    "",
    " ",
    "\n",
    "e",
    "user: ",
    "assistant: ",
    "<eos>",
    "<pad>",
    "<think>",
    "</think>",
    "{{ x }}",
    "東京",
    "🙂",
    "{%",
    "0",
]
POSITIONS = 64


class RandomSampler:
    """Replies of one token and more, with and without a stop token; checks the contexts against one another."""

    def __init__(self, generator: random.Random) -> None:
        self.generator = generator

    def __call__(self, model: Any, prompts: Any, config: SamplingConfig, *, generator: Any = None) -> Samples:
        rows = []
        for prompt in prompts:
            assert 0 < len(prompt) <= POSITIONS - config.max_new_tokens
            length = self.generator.randint(1, config.max_new_tokens)
            row = [self.generator.randrange(2, VOCAB_SIZE) for _ in range(length)]
            if length < config.max_new_tokens or self.generator.random() < 0.5:
                row[-1] = EOS_TOKEN_ID
            rows.append(torch.tensor(row))
        return Samples(
            prompts=list(prompts), responses=rows, logprobs=[-row.float() / VOCAB_SIZE for row in rows],
            finished=[int(row[-1]) == EOS_TOKEN_ID for row in rows],
        )  # fmt: skip


class RandomEnvironment:
    """Texts or messages from `PIECES`, random rewards, endings and failures, all by the seed."""

    def reset(self, seed: int) -> Any:
        self.generator = random.Random(seed)
        self.chat = self.generator.random() < 0.5
        self.rewards: list[float] = []
        return self._observation()

    def step(self, reply: str) -> Turn:
        draw = self.generator.random()
        if draw < 0.01:
            raise RuntimeError("a fault that stays")
        self.rewards.append(self.generator.choice([0.0, 1.0, -0.5]))
        return Turn(
            self._observation(), reward=self.rewards[-1], terminated=draw < 0.2, truncated=0.15 < draw < 0.3,
            info={"total": sum(self.rewards)},
        )  # fmt: skip

    def _observation(self) -> Any:
        text = "".join(self.generator.choices(PIECES, k=self.generator.choice([0, 1, 3, 40])))
        return [{"role": "user", "content": text}] if self.chat else text


def check(episode: Episode, config: EpisodeConfig) -> None:
    assert 1 <= episode.turns <= config.max_turns
    assert len(episode.response_ids) <= (config.max_tokens or len(episode.segments()) * POSITIONS)
    segments = episode.segments()
    assert all(len(context) + span.stop - span.start <= POSITIONS for context, span in segments)
    own = torch.cat([episode.response_ids[span][episode.mask[span]] for _, span in segments])
    assert torch.equal(own, episode.response_ids[episode.mask])
    assert episode.total_reward == pytest.approx(episode.info["total"])
    assert episode.turn_ends is not None
    assert len(episode.turn_ends) == episode.turns == len(episode.replies())
    assert int(episode.turn_starts.sum()) == episode.turns
    assert bool(episode.mask[-1]) or episode.truncated
    # Sampled tokens have the sampler's log-probabilities, all others none.
    assert episode.logprobs is not None
    expected = torch.where(episode.mask, -episode.response_ids.float() / VOCAB_SIZE, 0.0)
    assert torch.equal(episode.logprobs, expected)


REWRITES = "{{ messages[0]['content'][:3] }} {{ messages[-1]['content'] }}{{ ' ->' if add_generation_prompt }}"
"""A chat template that shows the beginning of the first message, and the last one."""


def play(episodes: int, seed: int, *, template: str | None = None) -> int:
    """Play random episodes under random limits and check each; the number of those that were dropped."""
    generator, dropped = random.Random(seed), 0
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = template or tokenizer.chat_template
    for start in range(0, episodes, 50):
        config = EpisodeConfig(
            max_turns=generator.randint(1, 6), max_tokens=generator.choice([None, 4, 9, 30]), max_concurrency=1,
            timeout=None, retries=generator.randint(0, 1),
        )  # fmt: skip
        runner = EnvironmentSampler(
            factory=RandomEnvironment, sampler=RandomSampler(generator), tokenizer=tokenizer, config=config,
            device=torch.device("cpu"), max_positions=POSITIONS, may_rewrite=template is not None,
        )  # fmt: skip
        sampling = SamplingConfig(max_new_tokens=generator.randint(1, 4), stop_token_ids=(EOS_TOKEN_ID,))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*episodes were dropped")
            played = runner(torch.nn.Identity(), [{"seed": start + row} for row in range(50)], sampling)
        assert played.drifted_turns == 0
        assert all(isinstance(error, RuntimeError | ValueError) for error in played.errors)
        for episode in played.episodes:
            if episode is None:
                dropped += 1
            else:
                check(episode, config)
    return dropped


@pytest.mark.parametrize("template", [None, REWRITES])
def test_random_episodes_keep_every_promise(template: str | None) -> None:
    assert 0 < play(300, seed=0, template=template) < 150


@pytest.mark.slow
@pytest.mark.parametrize("template", [None, REWRITES])
def test_twenty_thousand_random_episodes_keep_every_promise(template: str | None) -> None:
    assert 0 < play(20_000, seed=1, template=template) < 10_000
