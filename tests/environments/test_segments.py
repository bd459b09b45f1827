"""Segments: where the chat template rewrites the history, an episode goes on in a row of its own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import trl

from rlhf_ppo import GRPO, PPOTrainer, TrainConfig
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.environments import EnvironmentSampler, Episode, EpisodeConfig, Turn
from rlhf_ppo.functional import gae
from rlhf_ppo.learner.running_moments import RunningMoments, normalize_scores
from rlhf_ppo.rollout.episodes import episode_rows, responses_of_episodes
from rlhf_ppo.rollout.experience import Responses, RewardShaping, ScoredResponses, shape_rollout
from rlhf_ppo.rollout.rebalance import rebalance_empty_ranks
from tests.environments.test_episodes import SAMPLING, Script
from tests.support.games import Chat
from tests.support.tiny_models import tiny_tokenizer
from tests.support.tiny_run import config, parameters, trainer

LAST_MESSAGE = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}{{ ' -> ' }}{% endif %}"


def play(
    template: str, *replies: str, factory: Any = Chat, special: Sequence[str] = (), **settings: Any
) -> tuple[Episode, list[list[int]], Any]:
    """One episode; what the sampler read in each turn; the tokenizer."""
    tokenizer, sampler = tiny_tokenizer(chat=True), Script(*replies, stop=False)
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": list(special)})
    tokenizer.chat_template, sampler.tokenizer = template, tokenizer
    runner = EnvironmentSampler(
        factory=factory, sampler=sampler, tokenizer=tokenizer, device=torch.device("cpu"),
        config=EpisodeConfig(**settings), may_rewrite=True,
    )  # fmt: skip
    (episode,) = runner(torch.nn.Identity(), [{}], SAMPLING).episodes
    assert episode is not None
    return episode, sampler.contexts, tokenizer


def conversation(replies: list[str]) -> list[dict[str, str]]:
    """The chat before the next reply."""
    messages = [{"role": "user", "content": "hello"}]
    for number, reply in enumerate(replies):
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": f"turn {number + 1}"}]
    return messages


TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = sorted(TRL_TEMPLATES.glob("qwen3*.jinja"))


@pytest.mark.parametrize("template", [LAST_MESSAGE, *(path.read_text("utf-8") for path in TEMPLATES)])
def test_the_policy_reads_before_each_reply_what_a_chat_with_the_template_shows_it(template: str) -> None:
    replies = ["<think>\na\n</think>\n\nhi", "there"]
    episode, contexts, tokenizer = play(template, *replies)
    for turn, context in enumerate(contexts):
        text = tokenizer.apply_chat_template(conversation(replies[:turn]), tokenize=False, add_generation_prompt=True)
        assert context == tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = episode_rows([episode])
    read = [row.prompt_ids.tolist() + row.response_ids.tolist() for row in rows]
    for context, reply in zip(contexts, episode.replies(), strict=True):
        assert any(row[: len(context) + len(reply)] == context + reply.tolist() for row in read)


def test_a_template_that_only_appends_begins_no_segment_even_where_a_reply_is_encoded_otherwise() -> None:
    """The text of the reply leaves out the special token in its middle."""
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    episode, contexts, tokenizer = play(template, "h<pad>i", "there")
    assert tokenizer.decode(contexts[1]).count("<pad>") == 1
    assert episode.contexts == () and episode.numbers()["segments"] == 1


def test_a_segment_ends_with_its_last_reply_and_holds_its_rewards() -> None:
    episode, contexts, _ = play(LAST_MESSAGE, "hi", "there")
    first, second = episode_rows([episode])
    assert [row.prompt_ids.tolist() for row in (first, second)] == contexts
    assert first.continues and first.truncated and bool(first.mask.all())
    assert not second.continues and second.truncated == episode.truncated
    assert float(first.rewards.sum() + second.rewards.sum()) == episode.total_reward
    assert first.turns == second.turns == 1 and episode.turns == 2


def test_a_segment_before_which_an_environment_hung_is_left_out() -> None:
    """The episode is cut off before the reply that was not answered, and with it the context of that reply."""
    episode = Episode(
        prompt_ids=torch.tensor([3]), response_ids=torch.tensor([5, 6, 7]), mask=torch.tensor([True, False, True]),
        rewards=torch.tensor([1.0, 0.0, 2.0]), contexts=((2, torch.tensor([8, 9])),),
    )  # fmt: skip
    assert [(ids.tolist(), span.start, span.stop) for ids, span in episode.segments()] == [([3], 0, 1), ([8, 9], 2, 3)]
    with pytest.raises(ValueError, match="a segment would hold no action"):
        Episode(
            prompt_ids=torch.tensor([3]), response_ids=torch.tensor([5, 6]), mask=torch.tensor([True, False]),
            rewards=torch.zeros(2), contexts=((1, torch.tensor([8])),),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["nemotron_3_nano", "qwen3_6", "deepseek_r1_distill"])
def test_thinking_that_the_template_begins_is_dropped_with_what_the_policy_writes_of_it(name: str) -> None:
    """The reply has the closing mark alone; Nemotron's template knows a thought by both."""
    template = (TRL_TEMPLATES / f"{name}.jinja").read_text("utf-8")
    _, contexts, tokenizer = play(template, "plan\n</think>\n\nhi", "there")
    first, second = map(tokenizer.decode, contexts)
    assert first.endswith("<think>\n") and second.endswith("<think>\n")
    assert "hi" in second and "plan" not in second


CHANNELS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]
LAST_PART = (
    "{{% for m in messages %}}{{{{ m['role'] + ': ' + m['content'].split('{}')[-1] + '\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}assistant: {{% endif %}}"
)


@pytest.mark.parametrize("mark", ["</think>", "<channel|>", "[/THINK]"])
def test_thinking_is_dropped_from_a_reply_whose_marks_are_special_tokens_too(mark: str) -> None:
    """Their text is gone from what the environment reads; without it the template would keep the thinking."""
    replies, seen = [f"plan{mark}hi", "there"], Chat()
    _, contexts, tokenizer = play(LAST_PART.format(mark), *replies, special=[mark], factory=lambda: seen)
    assert tokenizer.decode(contexts[1]) == "user: hello\nassistant: hi\nuser: turn 1\nassistant: "
    assert seen.seen[0] == "planhi"


def test_marks_that_both_policy_and_template_write_are_not_rendered_twice() -> None:
    """The template of gpt-oss writes the channel before a content, which the policy samples itself: it is appended."""
    template = next(path for path in TRL_TEMPLATES.glob("gptoss.jinja")).read_text("utf-8")
    replies = ["<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>hi", "there"]
    with pytest.warns(UserWarning, match="serve it with a template that keeps the thinking"):
        episode, contexts, tokenizer = play(template, *replies, special=CHANNELS)
    assert episode.contexts == ()
    assert tokenizer.decode(contexts[1]).startswith(tokenizer.decode(contexts[0]) + replies[0])


class ReusesItsMessages:
    """Keeps one list and one message, and changes both."""

    def reset(self) -> list[dict[str, str]]:
        self.messages = [{"role": "user", "content": "hello"}]
        self.answer = {"role": "user", "content": ""}
        return self.messages

    def step(self, reply: str) -> Turn:
        self.messages.append({"role": "assistant", "content": reply})
        self.answer["content"] += "x"
        return Turn([self.answer])


def test_an_environment_may_go_on_with_the_messages_that_it_returned() -> None:
    whole = "{% for m in messages %}{{ m['content'] + '|' }}{% endfor %}{{ messages | length }}"
    _, contexts, tokenizer = play(whole, "a", "b", "c", factory=ReusesItsMessages, max_turns=3)
    assert [tokenizer.decode(ids) for ids in contexts] == ["hello|1", "hello|a|x|3", "hello|a|x|b|xx|5"]


def test_a_context_begins_between_turns() -> None:
    with pytest.raises(ValueError, match=r"begin between turns, got positions \[1\] and turn_ends \(2, 4\)"):
        replace(two_segments(), turn_ends=(2, 4), contexts=((1, torch.tensor([8])),))
    with pytest.raises(TypeError, match="a tensor of token ids for each position"):
        replace(two_segments(), contexts=((3, [8, 9]),))
    with pytest.raises(ValueError, match=r"turn_ends must be rising positions.*got \(\)"):
        replace(two_segments(), turn_ends=())


def two_segments() -> Episode:
    return Episode(
        prompt_ids=torch.tensor([3]), response_ids=torch.tensor([5, 6, 9, 7]),
        mask=torch.tensor([True, True, False, True]), rewards=torch.tensor([0.0, 1.0, 0.0, 2.0]),
        contexts=((3, torch.tensor([8, 9])),),
    )  # fmt: skip


def test_the_value_of_the_next_segment_stands_for_the_future_of_the_one_before() -> None:
    """By hand: delta of the last action is r + gamma V(first state of the next row) - V; lambda ends at the row."""
    responses = responses_of_episodes([two_segments()], torch.device("cpu"))
    values = torch.tensor([[0.1, 0.2, 0.3], [0.7, 0.8, 0.0]])
    zeros = torch.zeros(2, 2)
    scored = ScoredResponses(logprobs=zeros, values=values, ref_logprobs=zeros, kl=zeros)
    rollout, _ = shape_rollout(responses, scored, RewardShaping(kl_coef=0.0))
    steps = rollout.rewards, rollout.values, rollout.terminated, rollout.truncated
    batch, _ = gae(*steps, gamma=0.9, lam=0.5, mask=rollout.mask)
    last = 1.0 + 0.9 * 0.7 - 0.2
    first = 0.0 + 0.9 * 0.2 - 0.1 + 0.9 * 0.5 * last
    torch.testing.assert_close(batch[0], torch.tensor([first, last]))
    torch.testing.assert_close(batch[1, 0], torch.tensor(2.0 - 0.7))


def test_scores_are_normalized_and_compared_by_episode() -> None:
    """Totals 3 and 4, mean 3.5, standard deviation 1 / sqrt(2), clipped at 0.5 of it; the mean goes off once."""
    scores, mask = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 4.0]]), torch.tensor([[1, 1], [1, 0], [1, 1]]).bool()
    continues = torch.tensor([True, False, False])
    moments = RunningMoments()
    found = normalize_scores(scores, mask, moments, scale=True, shift=True, clip=0.5, continues=continues)
    assert moments.count == 2 and float(moments.mean) == 3.5
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0], [-1.5, 0.0], [0.0, 0.5]]))
    inputs = TokenInputs(prompts=[torch.ones(1)] * 3, responses=[torch.ones(2), torch.ones(1), torch.ones(2)])
    zeros = torch.zeros(3, 2)
    scored = ScoredResponses(logprobs=zeros, values=torch.zeros(3, 3), ref_logprobs=zeros, kl=zeros)
    responses = Responses(inputs=inputs, mask=mask, scores=scores, continues=continues)
    rollout, _ = shape_rollout(responses, scored, RewardShaping(kl_coef=0.0))
    assert rollout.scores is not None and rollout.scores.tolist() == [3.0, 3.0, 4.0]


def test_the_rows_of_an_episode_stay_on_one_process() -> None:
    """Process 1 has nothing: it gets whole episodes of process 0."""
    here = responses_of_episodes([two_segments() for _ in range(4)], torch.device("cpu"))
    shares = []
    for rank in range(2):
        gather = Mock(side_effect=[[8, 0], [here, None]])
        share = rebalance_empty_ranks(here if rank == 0 else None, gather, rank, torch.device("cpu"))
        assert share.continues is not None
        assert share.continues.tolist() == [True, False] * (len(share.inputs) // 2)
        shares.append(len(share.inputs))
    assert shares == [4, 4]


def chatting(**settings: Any) -> PPOTrainer:
    """A trainer whose chats show the last message alone."""
    own = trainer(**settings)
    own.tokenizer.chat_template = LAST_MESSAGE
    return own


def test_ppo_learns_from_segments_in_the_contexts_in_which_they_were_sampled() -> None:
    """The doctor, too, reads them in these contexts: the sampler's log-probabilities are right."""
    own = chatting(diagnose=True)
    before = parameters(own)
    state = own.train(None, config(iterations=2), environment=Chat)
    metrics = state.history[0]
    assert metrics["env/turns"] == metrics["env/segments"] == 2
    assert metrics["env/reward_mean"] == 2 and metrics["env/token_drift"] == 0
    assert metrics["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["sampler/kl"] == pytest.approx(0, abs=1e-4)
    assert own.diagnosis is not None
    assert {"sampler", "draws"} <= set(own.diagnosis.checked)
    assert {found.name for found in own.diagnosis.warnings} == {"reward_survives_empty_reply"}  # as a chat's does
    assert own.last_batch is not None
    assert len(own.last_batch[0].inputs) == 2 * own.config.batch_size
    assert not torch.equal(before, parameters(own))


def test_an_evaluation_counts_the_tokens_of_all_segments() -> None:
    own = chatting()
    found = own.evaluate(4, None, config(iterations=1).sampling, environment=Chat).measures
    assert found["length"] == found["sampled_tokens"] and found["segments"] == [2.0] * 4
    torch.testing.assert_close(torch.tensor(found["kl"]), torch.zeros(4), rtol=0, atol=1e-4)
    assert all(1 < value < 20 for value in found["reference_nll"])


def test_appending_may_be_chosen_and_is_all_there_is_without_a_critic() -> None:
    sampling = replace(SAMPLING, num_return_sequences=2)
    for own, episodes in ((chatting(), EpisodeConfig(history="append")), (chatting(algorithm=GRPO()), EpisodeConfig())):
        with pytest.raises(ValueError, match="rewrites them"):
            own.train(
                None, TrainConfig(iterations=1, sampling=sampling, episodes=episodes, progress=False), prompts=4,
                environment=Chat,
            )  # fmt: skip


def test_segments_given_to_step_need_a_critic() -> None:
    own = trainer(batch_size=2, mini_batch_size=2, learning_rate=1e-5)
    own.step([two_segments(), two_segments()])
    with pytest.raises(ValueError, match="with a critic"):
        trainer(batch_size=2, mini_batch_size=2, algorithm=GRPO()).step([two_segments(), two_segments()], group_size=2)
