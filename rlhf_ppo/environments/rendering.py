"""Observations as token ids, appended to what was sampled: no reply is ever encoded again.

A text observation is encoded by itself. Messages are rendered by the chat template, with a placeholder for the reply
before them; what follows the placeholder is appended. That is right for templates that leave earlier turns as they
are, which `check_prefix_stability` tries at the start. Otherwise a critic can take the place of what was cut: then the
conversation is rendered whole before each reply (`Renderer.whole`).
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ppo.chat.encoding import decode_tokens, encode_texts, whole_characters
from rlhf_ppo.chat.nested import UnreadableText
from rlhf_ppo.chat.template import render_chat
from rlhf_ppo.environments.base import Messages, Observation

_REPLY = "REPLY0PLACEHOLDER"
"""Stands for the reply in a rendered conversation; one word without spaces, which no template changes."""
_TEXT = "TEXT0PLACEHOLDER"
"""Stands for the text of a message."""
_ANSWER = {"role": "user", "content": _TEXT}
_BEFORE, _WORD = "\n", "a"
"""A text that no tokenizer joins with what follows, and a word."""
_OPENED = re.compile(r"(<think>|\[THINK\])\s*\Z")
"""Thinking that a template begins before the reply."""
_THOUGHTS = [
    f"{marks.replace('...', 'plan')}{_REPLY}"
    for marks in ("<think>\n...\n</think>\n\n", "<|channel>thought\n...\n<channel|>", "[THINK]...[/THINK]")
]
"""Replies with thinking, between the marks of most models, of Gemma 4 and of Mistral."""


@dataclass
class Renderer:
    """Turns observations into token ids.

    Args:
        may_rewrite: Whether a template that rewrites earlier turns is used as it is; otherwise it is refused, and one
            that changes their thinking alone is appended to.
    """

    tokenizer: PreTrainedTokenizerBase
    may_rewrite: bool = False
    rewrites: bool = False
    """Whether the conversation is rendered whole before each reply, because the template rewrites earlier turns."""
    _checked: bool = False
    _encoded: dict[str, list[int]] = field(default_factory=dict)
    """Observations repeat: a batch of episodes hears the same few words."""

    def prompt(self, observation: Observation, template_kwargs: Mapping[str, Any]) -> list[int]:
        """Token ids of the first observation, up to the start of the first reply; never empty."""
        if isinstance(observation, str):
            (ids,) = encode_texts(self.tokenizer, [whole_characters(observation)])
        else:
            conversation = _Conversation(self.tokenizer, observation, template_kwargs)
            if not self._checked:
                try:
                    sample = conversation.sample()
                    self.rewrites = self.may_rewrite and sample.reads_replies() and not sample.is_append_only()
                    if not self.rewrites:
                        check_prefix_stability(sample)
                except UnreadableText as error:  # of the template itself, not of this conversation alone
                    raise ValueError(str(error)) from error
                self._checked = True
            ids = self._encode(conversation.render())
        return ids or [self._first_token()]

    def content(self, context: list[int], reply: list[int], *, finished: bool) -> str:
        """The text of a reply in a rendered conversation: with all special tokens in it but the one that ended it.

        They may be the marks of the thinking that the template drops. The first mark is often the end of the context.
        """
        ends = finished and reply[-1] in self.tokenizer.all_special_ids
        text = decode_tokens(self.tokenizer, reply[:-1] if ends else reply)
        opened = _OPENED.search(decode_tokens(self.tokenizer, context[-32:]))
        return text if opened is None or text.startswith(opened[1]) else opened[0] + text

    def whole(self, messages: Messages, template_kwargs: Mapping[str, Any]) -> list[int]:
        """Token ids of a whole conversation, up to the start of the next reply."""
        text = _Conversation(self.tokenizer, messages, template_kwargs).render()
        return list(self.tokenizer(whole_characters(text), add_special_tokens=False, verbose=False)["input_ids"])

    def continuation(
        self,
        first: Observation,
        observation: Observation,
        last_token: int,
        *,
        finished: bool,
        template_kwargs: Mapping[str, Any],
    ) -> list[int]:
        """Token ids between the last sampled token and the start of the next reply.

        Args:
            first: The first observation; its messages begin the rendered conversation.
            last_token: Last token of the reply.
            finished: Whether the reply ended with a stop token or string.
        """
        if isinstance(observation, str):
            return self._encode_behind(observation)
        messages = first if isinstance(first, list) else [{"role": "user", "content": first}]
        ids = self._encode_behind(_Conversation(self.tokenizer, messages, template_kwargs).after_reply(observation))
        # The template ends the reply with the token that the policy has sampled itself.
        return ids[1:] if finished and ids[:1] == [last_token] else ids

    def _encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self.tokenizer(whole_characters(text), add_special_tokens=False)["input_ids"]
        return self._encoded[text]

    def _encode_behind(self, text: str) -> list[int]:
        """Token ids of a text that follows another one; alone, tokenizers of SentencePiece put a space before it."""
        start = self._encode(_BEFORE)
        puts_space = self._encode(_BEFORE + _WORD)[len(start) :] != self._encode(_WORD)
        both = self._encode(_BEFORE + text) if puts_space else []
        return both[len(start) :] if puts_space and both[: len(start)] == start else self._encode(text)

    def _first_token(self) -> int:
        token = self.tokenizer.bos_token_id
        token = self.tokenizer.eos_token_id if token is None else token
        if token is None:
            raise ValueError(
                "an environment's first observation is empty and the tokenizer has no BOS token: the model has nothing "
                "to continue from. Let reset() return text."
            )
        return int(token)


@dataclass(frozen=True)
class _Conversation:
    """First messages of a conversation, and how the chat template continues it."""

    tokenizer: PreTrainedTokenizerBase
    messages: Messages
    template_kwargs: Mapping[str, Any]

    def sample(self) -> "_Conversation":
        """The same with a known text in the last message."""
        last = {**self.messages[-1], "content": _TEXT}
        return replace(self, messages=[*self.messages[:-1], last])

    def render(self, *later: dict[str, Any]) -> str:
        """The text up to the start of the next reply."""
        messages = [*self.messages, *later]
        return render_chat(self.tokenizer, messages, add_generation_prompt=True, options=self.template_kwargs)

    def after_reply(self, answer: Messages, reply: str = _REPLY) -> str:
        """The text from the end of a reply to the start of the next one."""
        return self.render({"role": "assistant", "content": reply}, *answer).rpartition(_REPLY)[2]

    def is_prefix_stable(self, reply: str) -> bool:
        """Whether two turns, rendered at once, are the turns rendered one by one."""
        turn = ({"role": "assistant", "content": reply}, _ANSWER)
        return self.render(*turn, *turn) == self.render() + 2 * (reply + self.after_reply([_ANSWER], reply))

    def reads_replies(self) -> bool:
        """Whether the text that the policy samples is a message's content, without marks that the template adds.

        Before the content of a reply, gpt-oss's template writes special tokens (of a channel) that the policy samples
        itself: they would be there twice.
        """
        before = self.render({"role": "assistant", "content": _REPLY}, _ANSWER).partition(_REPLY)[0]
        prompt = self.render()
        added = before[len(prompt) :] if before.startswith(prompt) else ""
        return not any(token in added for token in self.tokenizer.all_special_tokens)

    def is_append_only(self) -> bool:
        """Whether later turns change nothing of earlier ones, with thinking or without."""
        return self.keeps_turns() and all(map(self.is_prefix_stable, [_REPLY, *_THOUGHTS]))

    def keeps_turns(self) -> bool:
        """The same up to the header of each reply: thinking and its marks may come and go with later turns."""
        turn = ({"role": "assistant", "content": _REPLY}, _ANSWER)
        parts, after = self.render(*turn, *turn).split(_REPLY), self.after_reply([_ANSWER])
        if len(parts) != 3 or parts[2] != after:
            return False
        pairs = (parts[0], self.render()), (parts[1], after)
        return all(_TEXT in one and other.startswith(one.partition(_TEXT)[0] + _TEXT) for one, other in pairs)


def check_prefix_stability(conversation: _Conversation) -> None:
    """Raise a ValueError if a chat template renders earlier turns differently once a later one is there."""
    if not conversation.keeps_turns():
        raise ValueError(
            "expected a chat template that renders earlier turns as it did before, got one that rewrites them: the "
            "policy would be trained on other tokens than those that a chat with it holds. Use an algorithm with a "
            "critic and EpisodeConfig(history='auto'), a template whose rendering of a longer conversation begins with "
            "that of the shorter one, or let the environment return text instead of messages."
        )
    if not conversation.is_append_only():
        warnings.warn(
            "The chat template renders the thinking of earlier replies, or its marks, differently from how they were "
            "sampled; training keeps what was sampled. A chat that renders its whole history shows the policy another "
            "context than in training: serve it with a template that keeps the thinking, or train it with a critic "
            "and EpisodeConfig(history='auto'), unless the policy samples special tokens of the template (gpt-oss).",
            stacklevel=2,
        )
