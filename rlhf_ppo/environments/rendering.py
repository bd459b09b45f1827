"""Observations as token ids, appended to what was sampled: no reply is ever encoded again.

A text observation is encoded by itself. Messages are rendered by the chat template, with a placeholder for the reply
before them; what follows the placeholder is appended. That is right for templates that leave earlier turns as they
are, which `check_prefix_stability` tries at the start.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_ppo.environments.base import Messages, Observation

_REPLY = "REPLY0PLACEHOLDER"
"""Stands for the reply in a rendered conversation; one word without spaces, which no template changes."""
_ANSWER = {"role": "user", "content": "next"}
_THOUGHT = "<think>\nplan\n</think>\n\n" + _REPLY


@dataclass
class Renderer:
    """Turns observations into token ids.

    Args:
        tokenizer: The policy's tokenizer.
        template_kwargs: Passed to the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    _checked: bool = False
    _encoded: dict[str, list[int]] = field(default_factory=dict)
    """Observations repeat: a batch of episodes hears the same few words."""

    def prompt(self, observation: Observation) -> list[int]:
        """Token ids of the first observation, up to the start of the first reply; never empty."""
        if isinstance(observation, str):
            ids: list[int] = self.tokenizer(observation)["input_ids"]
        else:
            self._check_once(observation)
            ids = self._encode(self._render(observation))
        return ids or [self._first_token()]

    def continuation(
        self, first: Observation, observation: Observation, last_token: int, *, finished: bool
    ) -> list[int]:
        """Token ids between the last sampled token and the start of the next reply.

        Args:
            first: The first observation; its messages begin the rendered conversation.
            observation: The new observation.
            last_token: Last token of the reply.
            finished: Whether the reply ended with a stop token or string.
        """
        if isinstance(observation, str):
            return self._encode(observation)
        messages = first if isinstance(first, list) else [{"role": "user", "content": first}]
        ids = self._encode(self._after_reply(messages, observation))
        # The template ends the reply with the token that the policy has sampled itself.
        return ids[1:] if finished and ids[:1] == [last_token] else ids

    def _after_reply(self, messages: Messages, observation: Messages, reply: str = _REPLY) -> str:
        """The text from the end of a reply to the start of the next one."""
        rendered = self._render([*messages, {"role": "assistant", "content": reply}, *observation])
        return rendered.rpartition(_REPLY)[2]

    def _render(self, messages: Messages) -> str:
        settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **self.template_kwargs}
        return str(self.tokenizer.apply_chat_template(messages, **settings))

    def _encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._encoded[text]

    def _first_token(self) -> int:
        token = self.tokenizer.bos_token_id
        token = self.tokenizer.eos_token_id if token is None else token
        if token is None:
            raise ValueError(
                "an environment's first observation is empty and the tokenizer has no BOS token: the model has nothing "
                "to continue from. Let reset() return text."
            )
        return int(token)

    def _check_once(self, messages: Messages) -> None:
        """Check the chat template at the first conversation.

        Raises:
            ValueError: It renders earlier turns differently once a later one is there.
        """
        if self._checked:
            return
        self._checked = True
        if not self._is_prefix_stable(messages, _REPLY):
            raise ValueError(
                "expected a chat template that renders earlier turns as it did before, got one that rewrites them: the "
                "policy would be trained on other tokens than those that a chat with it holds. Use a template whose "
                "rendering of a longer conversation begins with that of the shorter one, or let the environment return "
                "text instead of messages."
            )
        if not self._is_prefix_stable(messages, _THOUGHT):
            warnings.warn(
                "The chat template removes the thinking of earlier turns; training keeps it, as it was sampled. A chat "
                "that renders its history anew shows the policy another context than in training: serve it with a "
                "template that keeps the thinking, or ask for replies without thinking.",
                stacklevel=2,
            )

    def _is_prefix_stable(self, messages: Messages, reply: str) -> bool:
        """Whether two turns, rendered at once, are the turns rendered one by one."""
        turn: Messages = [{"role": "assistant", "content": reply}, _ANSWER]
        appended = self._render(messages) + 2 * (reply + self._after_reply(messages, [_ANSWER], reply))
        return self._render([*messages, *turn, *turn]) == appended
