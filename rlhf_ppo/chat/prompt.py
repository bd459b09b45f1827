"""`ChatPrompt`, the text of a conversation together with its messages."""

from collections.abc import Mapping, Sequence
from typing import Any


class ChatPrompt(str):
    """A conversation as text with chat markup, as the policy reads it, and its `messages`.

    Reward sources get the prompts of conversations in this form: a text for those that read texts, and messages for a
    chat reward model, which renders them by its own template. Strings made from it (`prompt + response`) are plain.
    """

    messages: list[dict[str, Any]]

    def __new__(cls, text: str, messages: Sequence[Mapping[str, Any]]) -> "ChatPrompt":
        """Attach `messages` to `text`."""
        prompt = super().__new__(cls, text)
        prompt.messages = [dict(message) for message in messages]
        return prompt

    def __getnewargs__(self) -> tuple[Any, ...]:
        """Arguments with which pickle makes a copy."""
        return str(self), self.messages
