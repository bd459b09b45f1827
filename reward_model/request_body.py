"""Parse the bodies of requests to a reward-model server."""

import json
from typing import Any


def parse_samples(body: bytes, max_samples: int) -> tuple[list[Any], list[Any]]:
    """Parse prompts and responses from the body of POST /score.

    Raises:
        ValueError: The body is no JSON, lacks a list, or has more than `max_samples` samples.
    """
    content = _parse_json(body)
    if not isinstance(content, dict) or not all(isinstance(content.get(n), list) for n in ("prompts", "responses")):
        raise ValueError('The body must be {"prompts": [...], "responses": [...]}.')
    _check_count(content["responses"], max_samples)
    return content["prompts"], content["responses"]


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
