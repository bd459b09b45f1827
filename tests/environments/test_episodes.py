"""Episodes: the tokens that are trained are those that were sampled, each reward is where its reply ended."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl

from rlhf_ppo.environments import EnvironmentSampler, Episode, EpisodeConfig
from rlhf_ppo.samplers.base import Samples, SamplingConfig
from tests.support.games import Chat, CountE
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_tokenizer

SAMPLING = SamplingConfig(max_new_tokens=5, stop_token_ids=(EOS_TOKEN_ID,))


class Script:
    """A sampler that gives the replies of a list, in turn, and remembers the contexts that it continued."""

    def __init__(self, *replies: str, stop: bool = True) -> None:
        self.replies, self.stop = list(replies), stop
        self.contexts: list[list[int]] = []
        self.tokenizer = tiny_tokenizer()

    def __call__(self, model: Any, prompts: Any, config: SamplingConfig, *, generator: Any = None) -> Samples:
        self.contexts += [prompt.tolist() for prompt in prompts]
        ids = self.tokenizer(self.replies.pop(0))["input_ids"] + [EOS_TOKEN_ID] * self.stop
        row = torch.tensor(ids)
        count = len(prompts)
        return Samples(
            prompts=list(prompts), responses=[row] * count, logprobs=[torch.full(row.shape, -0.5)] * count,
            finished=[self.stop] * count,
        )  # fmt: skip


def play(
    factory: Any, sampler: Any, *, tasks: int = 1, chat: bool = False, keep_timed_out: bool = False, **settings: Any
) -> list[Episode]:
    runner = EnvironmentSampler(
        factory=factory, sampler=sampler, tokenizer=tiny_tokenizer(chat=chat), device=torch.device("cpu"),
        config=EpisodeConfig(**settings), max_positions=128, keep_timed_out=keep_timed_out,
    )  # fmt: skip
    played = runner(torch.nn.Identity(), [{}] * tasks, SAMPLING)
    assert played.drifted_turns == 0
    return [episode for episode in played.episodes if episode is not None]


def test_an_episode_holds_the_sampled_tokens_and_the_observations_between_them() -> None:
    """Each context that the sampler continued is the beginning of what is trained."""
    tokenizer, sampler = tiny_tokenizer(), Script("e", "ee", "x")
    (episode,) = play(CountE, sampler)
    answer = tokenizer(" and")["input_ids"]
    replies = [[*tokenizer(text)["input_ids"], EOS_TOKEN_ID] for text in ("e", "ee", "x")]
    assert episode.prompt_ids.tolist() == tokenizer("The movie")["input_ids"]
    assert episode.response_ids.tolist() == replies[0] + answer + replies[1] + answer + replies[2]
    whole = episode.prompt_ids.tolist() + episode.response_ids.tolist()
    assert all(whole[: len(context)] == context for context in sampler.contexts)
    own = [True] * len(replies[0]) + [False] * len(answer) + [True] * len(replies[1])
    assert episode.mask.tolist() == own + [False] * len(answer) + [True] * len(replies[2])
    assert [reply.tolist() for reply in episode.replies()] == replies


def test_the_reward_of_a_turn_is_at_the_last_token_of_its_reply() -> None:
    (episode,) = play(CountE, Script("e", "ee", "x"))
    assert episode.turn_ends is not None
    assert [float(episode.rewards[end - 1]) for end in episode.turn_ends] == [1.0, 2.0, 0.0]
    assert episode.total_reward == 3.0
    assert not episode.truncated
    assert episode.logprobs is not None
    assert torch.equal(episode.logprobs, torch.where(episode.mask, -0.5, 0.0))
    assert episode.info == {"e": 0}


def test_a_terminated_episode_ends_with_its_reply_a_truncated_one_with_the_state_to_bootstrap_from() -> None:
    (ended,) = play(CountE, Script("a", "b", "c"))
    (cut,) = play(CountE, Script("a", "b", "c"), max_turns=2)
    assert bool(ended.mask[-1])
    assert cut.truncated
    assert not bool(cut.mask[-1])
    assert cut.turns == 2


@pytest.mark.parametrize("limit", [6, 7, 12, 13, 20])
def test_a_turn_begins_only_if_a_whole_reply_fits_before_the_token_limit(limit: int) -> None:
    (episode,) = play(lambda: CountE(turns=100), Script(*["abc"] * 9), max_tokens=limit)
    assert episode.truncated
    assert len(episode.response_ids) <= limit
    turn = len(tiny_tokenizer()("abc")["input_ids"]) + 1 + len(tiny_tokenizer()(" and")["input_ids"])
    assert episode.turns == 1 + (limit - SAMPLING.max_new_tokens) // turn


def test_the_chat_template_ends_a_reply_only_where_the_policy_did_not() -> None:
    """Here the template ends a reply with a newline, which no reply of the script has sampled."""
    (episode,) = play(Chat, Script("hi", "there"), chat=True)
    text = tiny_tokenizer().decode(torch.cat([episode.prompt_ids, episode.response_ids]))
    assert text == ("user: hello\nassistant: hi<eos>\nuser: turn 1\nassistant: there<eos>\nuser: turn 2\nassistant: ")


def test_a_template_whose_turns_end_in_the_sampled_stop_token_does_not_repeat_it() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<eos>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    for stop in (True, False):
        runner = EnvironmentSampler(
            factory=Chat, sampler=Script("hi", "there", stop=stop), tokenizer=tokenizer, device=torch.device("cpu"),
            config=EpisodeConfig(),
        )  # fmt: skip
        (episode,) = runner(torch.nn.Identity(), [{}], SAMPLING).episodes
        assert episode is not None
        text = str(tokenizer.decode(torch.cat([episode.prompt_ids, episode.response_ids])))
        assert text.startswith("user: hello<eos>\nassistant: hi<eos>\nuser: turn 1<eos>\nassistant: there<eos>\n")


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}{{ ' -> ' }}{% endif %}"
    runner = EnvironmentSampler(
        factory=Chat, sampler=Script("hi"), tokenizer=tokenizer, device=torch.device("cpu"), config=EpisodeConfig()
    )
    with pytest.raises(ValueError, match="rewrites them"):
        runner(torch.nn.Identity(), [{}], SAMPLING)


TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
SPEAK_PICTURES = ("idefics3", "llava_next", "smolvlm")
KEEP_ALL = ("cohere", "gemma3", "lfm2_v2", "llama3", "llama3_1", "llama3_2", "phi3", "qwen2_5", "qwen3_instruct_2507")


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_of_published_models_are_continued_as_they_continue_themselves(path: Path) -> None:
    """All that differs between turns appended and rendered at once is the header of a reply, with its thinking."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    runner = EnvironmentSampler(
        factory=Chat, sampler=Script("hi", "there", stop=False), tokenizer=tokenizer, device=torch.device("cpu"),
        config=EpisodeConfig(),
    )  # fmt: skip
    if path.stem.removesuffix("_training") in SPEAK_PICTURES:
        with pytest.raises(ValueError, match=r"rewrites them|refuses the conversation"):
            runner(torch.nn.Identity(), [{}], SAMPLING)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (episode,) = runner(torch.nn.Identity(), [{}], SAMPLING).episodes
    assert all("thinking" in str(warning.message) for warning in caught)
    assert not (caught and path.stem in KEEP_ALL)
    assert episode is not None
    seen = str(tokenizer.decode(torch.cat([episode.prompt_ids, episode.response_ids])))
    messages = [{"role": "user", "content": "hello"}]
    for number, reply in enumerate(("hi", "there"), start=1):
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": f"turn {number}"}]
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    if not caught:
        assert seen == whole
    assert seen.endswith(whole.rpartition("there")[2])


def test_what_an_environment_wants_to_tell_the_template_is_passed_to_it() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = "tools: {{ tools | length }}\n" + str(tokenizer.chat_template)

    class WithTools(Chat):
        chat_template_kwargs = {"tools": [{"type": "function", "function": {"name": "add"}}]}  # noqa: RUF012

    runner = EnvironmentSampler(
        factory=WithTools, sampler=Script("hi", "there"), tokenizer=tokenizer, device=torch.device("cpu"),
        config=EpisodeConfig(),
    )  # fmt: skip
    (episode,) = runner(torch.nn.Identity(), [{}], SAMPLING).episodes
    assert episode is not None
    assert str(tokenizer.decode(episode.prompt_ids)) == "tools: 1\nuser: hello\nassistant: "
