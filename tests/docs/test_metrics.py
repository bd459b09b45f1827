"""docs/metrics.md and the code know the same metrics."""

import re

import torch

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.rollout.collect import MissingEOS
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from tests.docs.pages import ROOT
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

PAGE = (ROOT / "docs" / "metrics.md").read_text()
NAMES = set(re.findall(r"`((?:objective|ppo|tokens|sampler|time|work|env|eval|guard)/[\w/*]+)`", PAGE))


def is_documented(name: str) -> bool:
    """By its name, or by one in which `NAME` or `*` stands for a part of it."""
    patterns = (re.escape(known).replace(r"\*", ".+").replace("NAME", r"[\w-]+") for known in NAMES)
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def test_every_metric_of_step_and_train_has_a_line() -> None:
    """Two named sources and a held-out evaluation, so that all families of names are there."""
    torch.set_num_threads(1)
    tokenizer = tiny_tokenizer()
    config = PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=1)
    trainer = PPOTrainer(config, AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2()), None, tokenizer)
    query = tokenizer("The movie", return_tensors="pt").input_ids[0]
    responses = [torch.tensor([40 + i, 50]) for i in range(4)]
    names = set(trainer.step([query] * 4, responses, [torch.tensor(float(i)) for i in range(4)]))

    prompts = PromptDataset.from_texts(["The movie", "This film"], tokenizer)
    state = trainer.train(
        {"length": lambda *, responses, **_: [float(len(text)) for text in responses], "zero": lambda **_: [0.0] * 4},
        TrainConfig(iterations=1, sampling=SamplingConfig(max_new_tokens=3), progress=False),
        prompts=prompts,
    )
    names |= set(state.metrics)
    missing = sorted(name for name in names if not is_documented(name))
    assert not missing, f"add to docs/metrics.md: {missing}"


def test_the_forty_statistics_of_the_classic_are_all_described() -> None:
    assert is_documented("objective/kl_dist")
    assert is_documented("env/reward/my-judge_mean")
    assert not is_documented("ppo/no_such_metric")


def test_the_reward_mean_is_after_the_penalty_for_a_missing_stop_token_as_its_line_says() -> None:
    """Nothing stops, so that every score of 1 is replaced by -5; the source's own mean stays 1."""
    tokenizer = tiny_tokenizer()
    config = PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1)
    trainer = PPOTrainer(config, AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2()), None, tokenizer)
    settings = TrainConfig(
        iterations=1, sampling=SamplingConfig(max_new_tokens=2), missing_eos=MissingEOS(penalty=5.0), progress=False
    )
    prompts = PromptDataset.from_texts(["The movie", "This film"], tokenizer)
    metrics = trainer.train({"judge": lambda responses: [1.0] * 2}, settings, prompts=prompts).metrics
    assert metrics["env/reward_mean"] == -5.0 and metrics["env/reward/judge_mean"] == 1.0
    (line,) = [line for line in PAGE.splitlines() if line.startswith("| `env/reward_mean`")]
    assert "after `missing_eos`" in line and "without the penalty" in line
