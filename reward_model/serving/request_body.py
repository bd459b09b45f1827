"""Parse the bodies of requests to the server."""

import json
from collections.abc import Callable
from typing import Any, TypeAlias

from reward_model.models.chat_markup import WholeText
from rlhf_ppo.chat.prompt import ChatPrompt

ParseBody: TypeAlias = Callable[[bytes, int], dict[str, list[Any]]]
"""(body, most samples) -> the reward model's arguments."""


def parse_samples(body: bytes, max_samples: int) -> dict[str, list[Any]]:
    """Parse the body of POST /score: `prompts`, `responses`, and if there are any `messages` of prompts, and `tools`.

    Raises:
        ValueError: The body is no JSON, lacks a list, or has more than `max_samples` samples.
    """
    content = _parse_json(body)
    if not isinstance(content, dict) or not all(isinstance(content.get(n), list) for n in ("prompts", "responses")):
        raise ValueError('The body must be {"prompts": [...], "responses": [...]}.')
    arguments = {name: content[name] for name in ("prompts", "responses")}
    _check_count(arguments["responses"], max_samples)
    for name in ("messages", "tools"):
        column = content.get(name)
        if column is not None:
            if not isinstance(column, list) or len(column) != len(arguments["prompts"]):
                raise ValueError(f'"{name}" must be a list with one list, or null, for each of "prompts".')
            arguments[name] = column
    messages = arguments.pop("messages", [None] * len(arguments["prompts"]))
    arguments["prompts"] = [_prompt(*pair) for pair in zip(arguments["prompts"], messages, strict=True)]
    return arguments


def parse_queries(body: bytes, max_samples: int) -> dict[str, list[Any]]:
    """Parse the body of OpenRLHF's POST /get_reward: whole texts, prompt and response in one.

    Raises:
        ValueError: The body is no JSON, lacks the texts, or has more than `max_samples`.
    """
    content = _parse_json(body)
    queries = content.get("query") if isinstance(content, dict) else None
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ValueError('The body must be {"query": [...], "prompts": [...]}, with whole texts under "query".')
    _check_count(queries, max_samples)
    prompts = content.get("prompts") or [""] * len(queries)
    if not isinstance(prompts, list) or len(prompts) != len(queries) or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f'"prompts" must have one text for each of the {len(queries)} of "query", or be left out.')
    texts = [WholeText(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
    return {"prompts": texts, "responses": [""] * len(texts)}


def _prompt(text: Any, messages: Any) -> Any:
    if messages is None:
        return text
    if not isinstance(text, str) or not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError('"messages" must hold the conversation of a prompt that is text, or null.')
    return ChatPrompt(text, messages)


def _parse_json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except RecursionError as error:
        raise ValueError("The body is nested too deeply. Send lists of texts or of messages.") from error
    except ValueError as error:  # also of bytes that are no UTF-8, and of numbers with thousands of digits
        raise ValueError(f"The body is not JSON: {error}.") from error


def _check_count(samples: list[Any], max_samples: int) -> None:
    if len(samples) > max_samples:
        raise ValueError(f"At most {max_samples} samples in one request, got {len(samples)}.")
