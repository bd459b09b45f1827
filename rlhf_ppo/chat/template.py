"""Render conversations by a tokenizer's chat template; what a template refuses is an error with its reason."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    Templates differ in what they take. The first form that a template takes is rendered: arguments of tool calls as
    mappings, then as JSON; messages that only call a tool without the field "content", then with "".

    Raises:
        UnreadableText: The template raises; the message has its reason.
    """
    given: dict[str, Any] = dict(options or {}, tokenize=False, add_generation_prompt=add_generation_prompt)
    if tools:
        given["tools"] = list(tools)
    refusals: list[Exception] = []
    for conversation in _forms(messages):
        try:
            return str(tokenizer.apply_chat_template(conversation, **given))
        except Exception as error:  # a template is a program of the model's maker and may raise anything
            refusals.append(error)
    refusal = refusals[min(1, len(refusals) - 1)]  # with contents, where that differs
    roles = [str(message.get("role")) for message in messages]
    raise UnreadableText(
        f"the chat template refuses the conversation of roles {', '.join(roles[:8])}{', ...' * (len(roles) > 8)}: "
        f"{' '.join(str(refusal).split()) or type(refusal).__name__:.200}. Change the row to what the template takes "
        "(a system message may have to go into the first user message), or set another chat_template."
    ) from refusal


def _forms(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """The conversation in each form that a template may take; forms that are equal come once."""
    plain = [{name: part for name, part in message.items() if part is not None} for message in messages]
    with_contents = [{**message, "content": message.get("content", "")} for message in plain]
    known: list[Any] = []
    for convert in (_as_mapping, _as_json):
        for form in (plain, with_contents):
            conversation = [_with_arguments(message, convert) for message in form]
            if conversation not in known:
                known.append(conversation)
                yield conversation


def _with_arguments(message: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """`message` with the arguments of its tool calls converted."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        converted = {**function, "arguments": convert(function.get("arguments", {}))}
        calls.append({**call, "function": converted} if "function" in call else converted)
    return {**message, "tool_calls": calls}


def _as_mapping(arguments: Any) -> Any:
    """OpenAI writes arguments as a text of JSON, which most templates would quote once more."""
    try:
        decoded = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return decoded if isinstance(decoded, Mapping) else arguments


def _as_json(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
