"""Read a value as text or as chat messages: the one reading for prompts, training, scoring and serving.

A message comes out as `{"role": text, "content": text or None, ...}` with every other field that it had (tool calls,
reasoning, names). Parts of text become text, ShareGPT's `from` and `value` become `role` and `content`, and the nulls
that `datasets` adds to nested columns are taken out.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ppo.chat.nested import UnreadableText, check_characters, without_nulls

Message = Mapping[str, Any]
Text = str | Sequence[Message]

_TEXT_PARTS = ("text", "input_text", "output_text")
_SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "bot": "assistant", "function_call": "assistant",
    "observation": "tool", "tool": "tool", "function_response": "tool",
}  # fmt: skip
_ROLES = {name: name for name in ("system", "user", "assistant", "tool", "developer")} | {
    name: _SHAREGPT_ROLES[name] for name in ("human", "prompter", "gpt", "chatgpt", "bot")
}
"""Other spellings of the roles that chat templates know; further roles stay as they are."""
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def read_text(value: object, field: str) -> Text:
    """Read a text, a list of messages, or a single message.

    Args:
        value: The value as it comes from a file, a `datasets.Dataset` or a request.
        field: Its name, for messages.

    Raises:
        UnreadableText: It is neither, or a message in it is malformed.
    """
    if isinstance(value, str):
        check_characters(value, f"field {field!r}")
        return value
    if isinstance(value, Mapping):
        return read_messages([value], field)
    if isinstance(value, list | tuple):
        return read_messages(value, field)
    raise UnreadableText(f"field {field!r} must be text or a list of chat messages, got {type(value).__name__}.")


def read_messages(value: Sequence[object], field: str) -> list[dict[str, Any]]:
    """Read a list of chat messages; an UnreadableText if it is empty or a message is malformed."""
    if not value:
        raise UnreadableText(f"field {field!r} is an empty list: at least one message is needed.")
    return [_message(message, f"field {field}[{index}]") for index, message in enumerate(value)]


def read_tools(value: object, field: str) -> list[dict[str, Any]] | None:
    """Read the tools that a conversation may call: a list of schemas, or its JSON; None if there are none.

    Raises:
        UnreadableText: It is no list of named schemas.
    """
    tools = _parse_json(value) if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise UnreadableText(
            f"field {field!r} must be a list of tool schemas (or its JSON), got {value!r:.60}. Leave the column out or "
            "give JSON schemas as transformers' chat templates take them."
        )
    return [without_nulls(tool, f"field {field}[{index}]") for index, tool in enumerate(tools)]


def as_messages(text: Text, role: str) -> list[dict[str, Any]]:
    """Convert `text` to chat messages: a string becomes one message of `role`, an empty one none."""
    if isinstance(text, str):
        return [{"role": role, "content": text}] if text or role == "assistant" else []
    return [dict(message) for message in text]


def is_empty(text: Text) -> bool:
    """Whether `text` says nothing: blank, or messages whose last one has neither content nor a tool call."""
    if isinstance(text, str):
        return not text.strip()
    last = text[-1]
    return not (last.get("content") or "").strip() and not any(last.get(name) for name in _INSTEAD_OF_CONTENT)


def _message(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UnreadableText(f"{place} must be a message with 'role' and 'content', got {type(value).__name__}.")
    message = without_nulls(value, place)
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, place)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise UnreadableText(f"{place} must have 'role' and 'content', got {sorted(map(str, value))}.")
    role = _ROLES.get(role.strip().lower(), role)
    for name in ("tool_calls", "function_call"):
        if not message.get(name):
            message.pop(name, None)
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], place)
    content = message.get("content")
    if content is None and not any(message.get(name) for name in _INSTEAD_OF_CONTENT):
        raise UnreadableText(
            f"{place} must have 'content' (or 'tool_calls'), got a message of {role!r} without. Give it a text, or "
            "leave the message out."
        )
    rest = {name: part for name, part in message.items() if name not in ("role", "content")}
    return {"role": role, "content": content if content is None else _content(content, place), **rest}


def _content(content: object, place: str) -> str:
    """The text of a message's content, which may come in parts."""
    if isinstance(content, str):
        return content
    parts = [content] if isinstance(content, Mapping) else content
    if not isinstance(parts, list):
        raise UnreadableText(f"{place}: 'content' must be text or parts of text, got {type(content).__name__}.")
    return "".join(_part(part, place) for part in parts if part is not None)


def _part(part: object, place: str) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in _TEXT_PARTS or not isinstance(text, str):
        raise UnreadableText(
            f"{place}: 'content' has a part of type {kind!r:.40}, but these models read text alone. Replace the part "
            "by text, or leave the row out."
        )
    return text


def _tool_calls(calls: object, place: str) -> list[dict[str, Any]]:
    calls = _parse_json(calls) if isinstance(calls, str) else calls
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise UnreadableText(f"{place}: 'tool_calls' must be a list of calls, got {type(calls).__name__}.")
    return [_tool_call(call, f"{place}: tool_calls[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: object, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UnreadableText(
            f"{place} must name a function, got {call!r:.60}. "
            'Write {"function": {"name": ..., "arguments": {...}}}.'
        )
    function = {**function, "arguments": function.get("arguments", {})}  # in the order in which they came
    return {**call, "function": function} if "function" in call else function


def _from_sharegpt(message: dict[str, Any], place: str) -> dict[str, Any]:
    """ShareGPT's turn as a message."""
    speaker, value = message.pop("from"), message.pop("value", None)
    role = _SHAREGPT_ROLES.get(speaker.strip().lower()) if isinstance(speaker, str) else None
    if role is None:
        raise UnreadableText(
            f"{place}: 'from' is {speaker!r:.40}, which is no known speaker. Use 'role' and 'content', or one of "
            f"{sorted(_SHAREGPT_ROLES)}."
        )
    if speaker.strip().lower() != "function_call":
        return {"role": role, "content": value, **message}
    call = _parse_json(value) if isinstance(value, str) else value
    return {"role": role, "content": None, "tool_calls": call if isinstance(call, list) else [call], **message}


def _parse_json(text: str) -> Any:
    """The value that `text` holds as JSON, or `text` itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
