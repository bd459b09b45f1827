"""Read the calls of tools in a reply, in the format in which the chat template writes them."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from rlhf_ppo.chat.nested import UnreadableText
from rlhf_ppo.chat.template import render_chat


@dataclass(frozen=True)
class ToolCall:
    """A call as the policy wrote it."""

    name: str
    arguments: dict[str, Any]
    """Texts where the format knows no types."""


ToolCallParser: TypeAlias = Callable[[str], list[ToolCall]]
"""The calls in a reply, which is without special tokens; ValueError says what is wrong with one."""

_TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\n]+)>")
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def tagged_calls(reply: str) -> list[ToolCall]:
    """Calls between `<tool_call>` and `</tool_call>`: JSON (Qwen, Hermes), or XML (Qwen Coder, Nemotron; GLM)."""
    return [_tagged_call(body) for body in _TAGGED.findall(_after_thinking(reply))]


def json_calls(reply: str) -> list[ToolCall]:
    """A reply that begins with calls as JSON, one by one or in a list (Llama; Mistral, whose mark is special)."""
    text, calls = _after_thinking(reply).strip(), []
    while text.startswith(("{", "[{")):
        found, end = _load(text)
        calls += [_json_call(call) for call in (found if isinstance(found, list) else [found])]
        text = text[end:].lstrip("; \n")
    return calls


def detect_parser(tokenizer: PreTrainedTokenizerBase) -> ToolCallParser:
    """The reader of the calls that the tokenizer's template writes, tried on one; a ValueError if there is none."""
    arguments = {"text": "word", "count": 3}
    sample: Any = {"id": "call00000", "type": "function", "function": {"name": "look_up", "arguments": arguments}}
    question = {"role": "user", "content": "question"}
    try:
        written = render_chat(tokenizer, [question, {"role": "assistant", "content": "", "tool_calls": [sample]}])
    except UnreadableText as error:
        raise ValueError(_unknown(str(error))) from error
    tail = written.rpartition("question")[2]
    for token in tokenizer.all_special_tokens:  # replies are without them
        tail = tail.replace(token, "")
    for parser, reply in ((tagged_calls, tail), (json_calls, tail[max(tail.find("{"), 0) :])):
        try:
            calls = parser(reply)
        except ValueError:
            continue
        if [(call.name, {name: str(value) for name, value in call.arguments.items()}) for call in calls] == [
            ("look_up", {"text": "word", "count": "3"})
        ]:
            return parser
    raise ValueError(_unknown(f"a call is written as {tail.strip()!r:.200}"))


def _unknown(reason: str) -> str:
    return (
        "expected a chat template whose tool calls are JSON or between <tool_call> and </tool_call>, got another "
        f"({reason}): no reply would be read as a call. Pass `parse`, a function from a reply to a list of ToolCall, "
        "or set another chat_template."
    )


def _after_thinking(reply: str) -> str:
    return reply.rpartition("</think>")[2]


def _tagged_call(body: str) -> ToolCall:
    if body.startswith("{"):
        return _json_call(_load(body)[0])
    function = _FUNCTION.match(body)
    pairs: list[tuple[str, str]] = (_PARAMETER if function else _ARGUMENT).findall(body)
    name = function[1] if function else body.partition("<arg_key>")[0]
    return ToolCall(name.strip(), {key.strip(): value for key, value in pairs})


def _json_call(call: Any) -> ToolCall:
    name = call.get("name") if isinstance(call, dict) else None
    arguments = call.get("arguments", call.get("parameters", {})) if isinstance(call, dict) else None
    arguments = _load(arguments)[0] if isinstance(arguments, str) else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise ValueError('a call must be {"name": ..., "arguments": {...}}')
    return ToolCall(name, arguments)


def _load(text: str) -> tuple[Any, int]:
    """The value of JSON that `text` begins with, and where it ends."""
    try:
        return json.JSONDecoder().raw_decode(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"a call must be JSON: {error}") from error
