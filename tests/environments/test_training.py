"""`train(environment=)`, `evaluate(environment=)`, `step(episodes)`: learning, rewards, seeds, resume, errors."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from rlhf_ppo import (
    GAE,
    GRPO,
    RLOO,
    TRPO,
    AlgorithmConfig,
    AutoModelForCausalLMWithValueHead,
    PPOClip,
    PPOConfig,
    PPOPenalty,
    PPOTrainer,
    Reinforce,
    ReinforcePlusPlus,
    TrainConfig,
)
from rlhf_ppo.environments import Episode, EpisodeConfig, Turn
from rlhf_ppo.loop.config import TrainState
from rlhf_ppo.loop.dynamic_sampling import DynamicSampling
from rlhf_ppo.loop.run_folder import RunFolder
from rlhf_ppo.report.token_view import token_view
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from tests.support.games import Chat, CountE
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_gpt2, tiny_tokenizer
from tests.support.tiny_run import SAMPLING, config, parameters, share_of_e, trainer

ALGORITHMS = [
    PPOClip(), PPOClip(gae=GAE(unit="turn")), PPOPenalty(), TRPO(), Reinforce(), ReinforcePlusPlus(), RLOO(), GRPO(),
]  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: type(algorithm).__name__)
def test_every_algorithm_takes_a_step_on_episodes(algorithm: AlgorithmConfig) -> None:
    own = trainer(algorithm=algorithm)
    before = parameters(own)
    sampling = SamplingConfig(max_new_tokens=4, stop_token_ids=(EOS_TOKEN_ID,), num_return_sequences=2)
    state = own.train(None, TrainConfig(iterations=1, sampling=sampling, progress=False), environment=CountE)
    assert state.metrics["env/turns"] == 3
    assert state.metrics["env/failed"] == state.metrics["env/token_drift"] == 0
    assert state.metrics["env/observed_tokens"] == 2 * len(tiny_tokenizer()(" and")["input_ids"])
    assert not torch.equal(before, parameters(own))


@pytest.mark.slow
def test_ppo_raises_the_reward_of_episodes_of_two_turns() -> None:
    own = trainer(batch_size=32, mini_batch_size=16, learning_rate=3e-3, init_kl_coef=0.001, ppo_epochs=4)
    history = own.train(None, config(iterations=15), environment=lambda: CountE(turns=2)).history
    first, last = (sum(row["env/reward_mean"] for row in part) / 3 for part in (history[:3], history[-3:]))
    assert last > 2 * first


def test_a_policy_with_lora_learns_from_episodes() -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        tiny_gpt2(), peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    own = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=1), model, tokenizer=tiny_tokenizer())
    before = parameters(own)
    state = own.train(None, config(iterations=1), prompts=4, environment=CountE)
    assert state.metrics["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert not torch.equal(before, parameters(own))


def played(own: PPOTrainer, rewards: Any, **settings: Any) -> tuple[TrainState, Any]:
    """One iteration, and the batch that it learned from."""
    state = own.train(rewards, config(iterations=1), environment=CountE, **settings)
    assert own.last_batch is not None
    return state, own.last_batch[0]


def test_rewards_of_sources_are_added_where_the_last_reply_ends() -> None:
    """A source reads the policy's own replies: the observation " and" between them is not an answer."""
    read: list[str] = []

    def source(prompts: Sequence[str], responses: Sequence[str], transcripts: Sequence[str]) -> list[float]:
        read.extend(responses)
        assert all(" and" in transcript for transcript in transcripts)
        return [10.0] * len(responses)

    own = trainer(algorithm=Reinforce(baseline=None, normalize_std=False), init_kl_coef=0.0)
    alone = trainer(algorithm=Reinforce(baseline=None, normalize_std=False), init_kl_coef=0.0)
    (state, batch), (_, without) = played(own, {"ten": source}), played(alone, None)
    assert not any(" and" in text for text in read)
    added = (batch.advantages - without.advantages)[batch.mask]
    assert torch.allclose(added, torch.tensor(10.0))  # γ = 1: every token is followed by the last one
    assert state.metrics["env/reward/ten_mean"] == 10
    assert state.metrics["env/reward_mean"] == pytest.approx(10 + state.metrics["env/reward/environment_mean"])


def test_episodes_of_a_group_share_a_seed_that_depends_on_their_row_alone() -> None:
    seeds: list[tuple[str, int]] = []

    class Seeded(CountE):
        def reset(self, seed: int, prompt: str) -> str:
            seeds.append((prompt, seed))
            return prompt

    sampling = SamplingConfig(max_new_tokens=2, num_return_sequences=2)
    settings = TrainConfig(
        iterations=2, sampling=sampling, progress=False, episodes=EpisodeConfig(max_concurrency=1, timeout=None)
    )
    trainer().train(None, settings, environment=Seeded)
    assert seeds[0::2] == seeds[1::2]
    assert len(set(seeds)) == len({prompt for prompt, _ in seeds}) == len({seed for _, seed in seeds}) == 4
    trained = set(seeds)
    seeds.clear()
    own = trainer()
    own.evaluate(own.dataset, None, SAMPLING, environment=Seeded)  # type: ignore[arg-type]
    assert not trained & set(seeds)


def test_an_evaluation_plays_every_episode_once_and_measures_it() -> None:
    evaluation = trainer().evaluate(6, None, SAMPLING, environment=CountE, episodes=EpisodeConfig(max_turns=2))
    assert len(evaluation.responses) == 6
    assert evaluation.measures["turns"] == [2.0] * 6
    assert evaluation.measures["truncated"] == [1.0] * 6
    assert all(" and" in transcript for transcript in evaluation.responses)
    assert max(evaluation.measures["length"]) <= 2 * SAMPLING.max_new_tokens  # own tokens alone


@pytest.mark.slow
def test_a_run_on_episodes_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer()
    expected = whole.train(None, config(iterations=4), environment=CountE).history
    first, second = trainer(), trainer()
    first.train(None, config(tmp_path, save_every=1), environment=CountE, callbacks=[lambda _, at: at.iteration == 2])
    resumed = second.train(None, config(tmp_path, save_every=1), environment=CountE)
    assert torch.equal(parameters(whole), parameters(second))
    for row, other in zip(expected[2:], resumed.history, strict=True):
        assert {name: other[name] for name in row if not name.startswith("time/")} == {
            name: value for name, value in row.items() if not name.startswith("time/")
        }


def test_an_environment_of_one_turn_learns_what_a_reward_source_teaches() -> None:
    """The same tokens with the same scores: every weight is the same afterwards."""

    class OneTurn(CountE):
        def step(self, reply: str) -> Turn:
            return Turn(reward=share_of_e([], [reply])[0], terminated=True)

    theirs, ours = (trainer(reuse_logprobs=False) for _ in range(2))
    theirs.train(share_of_e, config(iterations=2))
    ours.train(None, config(iterations=2), environment=OneTurn)
    assert torch.equal(parameters(theirs), parameters(ours))


def episode(**changes: Any) -> Episode:
    """Two turns of two tokens with an observation of one token between them."""
    values: dict[str, Any] = {
        "prompt_ids": torch.tensor([5, 6]), "response_ids": torch.tensor([7, 8, 9, 10, 11]),
        "mask": torch.tensor([True, True, False, True, True]),
        "rewards": torch.tensor([0.0, 0.5, 0.0, 0.0, 1.0]),
    }  # fmt: skip
    return Episode(**values | changes)


def test_step_takes_finished_episodes_and_learns_what_tensors_teach() -> None:
    episodes = [episode(response_ids=torch.arange(20 + row, 25 + row)) for row in range(4)]
    ours, theirs = (trainer(batch_size=4) for _ in range(2))
    ours.step(episodes)
    theirs.step(
        [each.prompt_ids for each in episodes], [each.response_ids for each in episodes],
        [each.rewards for each in episodes], [each.mask for each in episodes],
    )  # fmt: skip
    assert torch.equal(parameters(ours), parameters(theirs))


def test_a_truncated_episode_bootstraps_from_the_state_after_its_last_observation() -> None:
    """The last action is followed by two tokens of the environment: the policy would act after them."""
    mask = torch.tensor([True, True, True, False, False])
    cut = episode(mask=mask, rewards=torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]), truncated=True)
    own = trainer(batch_size=2, mini_batch_size=2, algorithm=PPOClip(gae=GAE(lam=0.0)), init_kl_coef=0.0)
    own.step([cut, cut])
    assert own.last_batch is not None
    batch, scored = own.last_batch
    assert float(batch.returns[0, 2]) == pytest.approx(1.0 + float(scored.values[0, 5]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": torch.tensor([0.0, 0.5, 2.0, 0.0, 1.0])}, "got 2.0 at token 2"),
        ({"mask": torch.zeros(5, dtype=torch.bool)}, "no action to learn from"),
        ({"mask": torch.ones(5)}, "boolean tensor"),
        ({"rewards": torch.zeros(4)}, "one entry for each of the 5"),
        ({"turn_ends": (3, 5)}, "after a sampled token"),
        ({"turn_ends": (5, 2)}, "rising positions"),
    ],
)
def test_a_malformed_episode_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        episode(**changes)


def test_step_refuses_episodes_beside_other_arguments() -> None:
    own = trainer(batch_size=2, mini_batch_size=2)
    with pytest.raises(ValueError, match="nothing but a list of episodes"):
        own.step([episode(), episode()], [torch.tensor([1])])
    with pytest.raises(ValueError, match="nothing but a list of episodes"):
        own.step([episode(), torch.tensor([1])])  # type: ignore[list-item]


class Called(CountE):
    """An instance that looks like a factory."""

    def __call__(self) -> CountE:
        return self


REFUSED: list[tuple[Callable[[PPOTrainer], object], type[Exception], str]] = [
    (lambda own: own.train(None, config()), ValueError, "without an environment"),
    (lambda own: own.train(share_of_e, config(), prompts=3), ValueError, "expected an environment"),
    (lambda own: own.train(share_of_e, config(episodes=EpisodeConfig(max_turns=2))), ValueError, "an environment"),
    (lambda own: own.train(None, config(), environment=Called()), TypeError, "Pass the class"),  # type: ignore[arg-type]
    (lambda own: own.train(None, config(), prompts=0, environment=CountE), ValueError, "positive number"),
    (lambda own: own.train(None, config(offload_rewards=True), environment=CountE), ValueError, "nothing to move"),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED)
def test_arguments_that_would_be_ignored_are_refused(
    call: Callable[[PPOTrainer], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call(trainer())


def test_a_run_on_episodes_evaluates_keeps_the_best_model_and_is_reported(tmp_path: Path) -> None:
    """Samples of the report are transcripts, its token view has the observations."""
    own = trainer()
    settings = config(tmp_path, iterations=2, eval_every=1, keep_best="score", save_every=1)
    state = own.train(None, settings, eval_prompts=4, environment=CountE)
    assert state.evaluation is not None
    assert state.metrics["eval/turns"] == 3
    assert (tmp_path / "best").is_dir()
    (trace, *_) = RunFolder.open(tmp_path).tokens()
    assert len(trace.own) == len(trace.tokens)
    assert "".join(text for text, is_own in zip(trace.tokens, trace.own, strict=True) if not is_own) == 2 * " and"
    (response, *_), _ = token_view([trace])
    assert "".join(token.text for token in response.tokens if not token.is_own) == 2 * " and"
    assert sum(token.begins_line for token in response.tokens) == 4  # three replies and two observations
    assert all(set(token.heat.values()) == {0.0} for token in response.tokens if not token.is_own)


def test_the_state_of_a_factory_is_saved_and_restored(tmp_path: Path) -> None:
    """A curriculum, for example; a class whose instances have a state is no such factory."""

    class Curriculum:
        level = 0

        def __call__(self) -> CountE:
            self.level += 1
            return CountE(turns=1)

        def state_dict(self) -> dict[str, int]:
            return {"level": self.level}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.level = state["level"]

    class WithState(CountE):
        def state_dict(self) -> dict[str, int]:
            return {"played": self.played}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.played = state["played"]

    first, second = Curriculum(), Curriculum()
    trainer().train(None, config(tmp_path, iterations=1, save_every=1), environment=first)
    trainer().train(None, config(tmp_path, iterations=2, save_every=1), environment=second)
    assert (first.level, second.level) == (8, 16)
    trainer().train(None, config(iterations=1), environment=WithState)


def test_episodes_carry_the_samplers_log_probabilities_to_the_importance_correction() -> None:
    own = trainer(importance_sampling_cap=2.0)
    metrics = own.train(None, config(iterations=1), environment=CountE).metrics
    assert metrics["sampler/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["sampler/logprob_difference"] < 1e-4


def test_dynamic_sampling_replaces_groups_of_episodes_that_earn_the_same() -> None:
    """The doctor plays episodes of the batch again: each with its own task."""
    own = trainer(algorithm=GRPO(), batch_size=8, mini_batch_size=4, diagnose=True)
    sampling = SamplingConfig(max_new_tokens=6, stop_token_ids=(EOS_TOKEN_ID,), num_return_sequences=2)
    settings = TrainConfig(iterations=1, sampling=sampling, progress=False, dynamic_sampling=DynamicSampling())
    state = own.train(None, settings, environment=lambda: CountE(turns=2))
    assert state.metrics["env/groups_sampled"] >= 4
    assert own.diagnosis is not None
    assert "reward_survives_empty_reply" in own.diagnosis.checked


def test_an_environment_s_messages_are_rendered_with_the_options_of_the_dataset() -> None:
    """The environment's own options count before them."""
    own = trainer()
    own.tokenizer.chat_template = "{{ mood }} {{ size }}{% for m in messages %} {{ m['content'] }}{% endfor %} :"
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "hello"}]}] * 2)
    prompts = PromptDataset(rows, own.tokenizer, chat_template_kwargs={"mood": "calm", "size": "small"})

    def large() -> Chat:
        game = Chat()
        game.chat_template_kwargs = {"size": "large"}  # type: ignore[attr-defined]
        return game

    for environment, beginning in ((Chat, "calm small hello"), (large, "calm large hello")):
        played = own.evaluate(prompts, None, SAMPLING, environment=environment)
        assert all(text.startswith(beginning) for text in played.prompts)


def test_the_tools_of_a_row_are_rendered_unless_the_environment_has_its_own() -> None:
    own = trainer()
    own.tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t['name'] }} {% endfor %}{% for m in messages %}{{ m['content'] }}{% endfor %} :"
    )
    message = [{"role": "user", "content": "hello"}]
    tools: list[Any] = [[{"name": "add"}, {"name": "sub"}], None, '[{"name": "mul"}]']
    rows = Dataset.from_dict({"prompt": [message] * 3, "tools": [json.dumps(tools[0]), *tools[1:]]})
    prompts = PromptDataset(rows, own.tokenizer)

    def with_tools() -> Chat:
        game = Chat()
        game.chat_template_kwargs = {"tools": [{"name": "look"}]}  # type: ignore[attr-defined]
        return game

    for environment, beginnings in ((Chat, ["add sub ", "", "mul "]), (with_tools, ["look "] * 3)):
        played = own.evaluate(prompts, None, SAMPLING, environment=environment)
        assert [text.split("hello")[0] for text in played.prompts] == beginnings


def test_prompts_that_were_cut_are_refused_with_an_environment() -> None:
    own = trainer()
    prompts = PromptDataset.from_texts(["The movie was a movie", "The"], own.tokenizer, max_prompt_tokens=2)
    with pytest.raises(ValueError, match="expected whole prompts for an environment, got 2 of 2 prompts"):
        own.evaluate(prompts, None, SAMPLING, environment=CountE)
