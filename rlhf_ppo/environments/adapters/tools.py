"""Functions as tools: the policy calls them, reads what they return, and answers."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import get_json_schema

from rlhf_ppo.chat.cells import parse_literal
from rlhf_ppo.chat.nested import UnreadableText
from rlhf_ppo.chat.template import render_chat
from rlhf_ppo.environments.adapters.tool_calls import ToolCall, ToolCallParser, detect_parser
from rlhf_ppo.environments.base import EnvironmentFactory, Messages, Turn, accepted_columns
from rlhf_ppo.environments.concurrency import resolve_awaitable

Tool = Callable[..., Any]
_PYTHON_NAMES = {"True": "true", "False": "false", "None": "null"}
"""Values that some templates write as Python does (Qwen Coder, Qwen 3.5), in JSON."""


def from_tools(
    tools: Sequence[Tool],
    tokenizer: PreTrainedTokenizerBase,
    *,
    reward: Callable[..., Any] | None = None,
    parse: ToolCallParser | None = None,
) -> EnvironmentFactory:
    """Functions that the policy may call until it answers: a reply without a call is the answer and ends the episode.

    The chat template shows their schemas, made from signature and docstring. What a call returns, or the error that it
    raises, is a message of the role "tool". The column `prompt` is the conversation, or its user message.

    Args:
        tools: Functions with type hints and a docstring in Google's style; they may be async.
        tokenizer: The policy's tokenizer, with a chat template that knows tools.
        reward: Called with the answer and the row's columns, `reward(answer, **columns)`; None: 0, for reward sources.
        parse: Reads the calls in a reply; None: in the chat template's own format.
    """
    schemas = _schemas(tools)
    _check_template(tokenizer, schemas)
    parser = parse or detect_parser(tokenizer)

    class ToolEnvironment:
        def reset(self, prompt: str | Messages, **columns: Any) -> Messages:
            self.chat_template_kwargs = {"tools": schemas}
            self.episode = _ToolEpisode({tool.__name__: tool for tool in tools}, schemas, parser)
            self.columns = columns
            return as_messages(prompt)

        def step(self, reply: str) -> Turn:
            return self.episode.step(reply, lambda: 0.0 if reward is None else reward(reply, **self.columns))

    return ToolEnvironment


def from_trl(
    environment_factory: Callable[[], Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: Sequence[Tool] = (),
    parse: ToolCallParser | None = None,
) -> EnvironmentFactory:
    """A class for TRL's `environment_factory`: its public methods are tools, `get_reward()` is the answer's reward.

    As there, the text of `reset(**columns)` is appended to the last user message of the column `prompt`.

    Args:
        environment_factory: The class.
        tokenizer: The policy's tokenizer, with a chat template that knows tools.
        tools: Further functions.
        parse: Reads the calls in a reply; None: in the chat template's own format.
    """
    schemas = _schemas([*tools, *_methods(environment_factory())])
    _check_template(tokenizer, schemas)
    parser = parse or detect_parser(tokenizer)

    class TRLEnvironment:
        def reset(self, **columns: Any) -> Messages:
            self.environment = environment_factory()
            self.chat_template_kwargs = {"tools": schemas}
            callables = [*tools, *_methods(self.environment)]
            self.episode = _ToolEpisode({tool.__name__: tool for tool in callables}, schemas, parser)
            text = resolve_awaitable(self.environment.reset(**accepted_columns(self.environment.reset, columns)))
            *before, last = as_messages(columns.get("prompt", ""))
            return [*before, last if text is None else {**last, "content": last["content"] + text}]

        def step(self, reply: str) -> Turn:
            return self.episode.step(reply, getattr(self.environment, "get_reward", float))

    return TRLEnvironment


def as_messages(prompt: str | Messages) -> Messages:
    """A conversation; text is the message of a user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


@dataclass
class _ToolEpisode:
    """Calls the tools that replies name, and counts."""

    tools: Mapping[str, Tool]
    schemas: Sequence[Mapping[str, Any]]
    parse: ToolCallParser
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("called_tool", "calls", "failed_calls"), 0))

    def step(self, reply: str, reward: Callable[[], Any]) -> Turn:
        """Results of the calls in a reply; the reward where there are none."""
        try:
            calls = self.parse(reply)
        except ValueError as error:
            messages = [self._message("", self._error(error))]
        else:
            if not calls:
                return Turn(reward=float(resolve_awaitable(reward())), terminated=True, info=dict(self.counts))
            messages = [self._message(call.name, self._result(call)) for call in calls]
        return Turn(messages, info=dict(self.counts))

    def _result(self, call: ToolCall) -> str:
        self.counts["called_tool"] = 1
        self.counts["calls"] += 1
        try:
            if call.name not in self.tools:
                raise ValueError(f"there is no tool {call.name}, but {', '.join(self.tools)}")
            return _as_text(resolve_awaitable(self.tools[call.name](**self._typed(call))))
        except Exception as error:  # of any tool: the policy reads it
            return self._error(error)

    def _typed(self, call: ToolCall) -> dict[str, Any]:
        """Arguments in which texts of formats without types are numbers and lists again."""
        (schema,) = (one["function"] for one in self.schemas if one["function"]["name"] == call.name)
        arguments, properties = dict(call.arguments), schema["parameters"].get("properties", {})
        for name, value in arguments.items():
            if isinstance(value, str) and properties.get(name, {}).get("type", "string") != "string":
                with suppress(json.JSONDecodeError):
                    arguments[name] = parse_literal(value) or json.loads(_PYTHON_NAMES.get(value.strip(), value))
        return arguments

    def _error(self, error: Exception) -> str:
        self.counts["failed_calls"] += 1
        return json.dumps({"error": str(error)})

    def _message(self, name: str, content: str) -> dict[str, Any]:
        return {"role": "tool", "name": name, "content": content}


def _as_text(result: Any) -> str:
    """Text as it is; else JSON, or Python's text of what JSON cannot hold, such as dates as keys."""
    try:
        return result if isinstance(result, str) else json.dumps(result, default=str)
    except (TypeError, ValueError):
        return str(result)


def _methods(environment: Any) -> list[Tool]:
    names = [name for name, _ in inspect.getmembers(type(environment), inspect.isfunction)]
    return [getattr(environment, name) for name in names if name[0] != "_" and name not in ("reset", "get_reward")]


def _schemas(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    return [get_json_schema(tool) for tool in tools]


def _check_template(tokenizer: PreTrainedTokenizerBase, schemas: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless the chat template shows the tools and what they return."""
    names = [schema["function"]["name"] for schema in schemas]
    asked = {"role": "user", "content": "question"}
    result = {"role": "tool", "name": "".join(names[:1]), "content": "42"}
    called = [asked, {"role": "assistant", "content": "a reply"}, result]
    try:
        shows_tools = all(name in render_chat(tokenizer, [asked], tools=schemas) for name in names)
        shows_results = "42" in render_chat(tokenizer, called, tools=schemas).rpartition("a reply")[2]
        reason = f"shows the tools: {shows_tools}, what they return: {shows_results}"
    except UnreadableText as error:
        shows_tools, shows_results, reason = False, False, str(error)
    if not (names and shows_tools and shows_results):
        raise ValueError(
            f"expected tools, and a chat template that shows them and what they return, got {len(names)} tools and "
            f"one that does not do ({reason}): the policy could not learn to use them. Set another chat_template."
        )
