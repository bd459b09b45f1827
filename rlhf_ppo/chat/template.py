"""Render conversations by a tokenizer's chat template; what a template refuses is an error with its reason."""

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ppo.chat.messages import Message
from rlhf_ppo.chat.nested import UnreadableText


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    options: Mapping[str, Any] | None = None,
) -> str:
    """The text of a conversation that `read_messages` has read.

    A message that only calls a tool has no content. It is given without the field, as transformers does; a template
    that cannot do without gets "".

    Raises:
        UnreadableText: The template raises; the message has its reason.
    """
    given: dict[str, Any] = dict(options or {}, tokenize=False, add_generation_prompt=add_generation_prompt)
    if tools:
        given["tools"] = list(tools)
    conversation = [{name: part for name, part in message.items() if part is not None} for message in messages]
    with_contents = [{**message, "content": message.get("content", "")} for message in conversation]
    try:
        try:
            return str(tokenizer.apply_chat_template(conversation, **given))
        except Exception:
            if conversation == with_contents:
                raise
            return str(tokenizer.apply_chat_template(with_contents, **given))
    except Exception as error:  # a template is a program of the model's maker and may raise anything
        roles = [str(message.get("role")) for message in conversation]
        raise UnreadableText(
            f"the chat template refuses the conversation of roles {', '.join(roles[:8])}{', ...' * (len(roles) > 8)}: "
            f"{' '.join(str(error).split()) or type(error).__name__:.200}. Change the row to what the template takes "
            "(a system message may have to go into the first user message), or set another chat_template."
        ) from error
