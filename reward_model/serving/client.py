"""A client of the reward-model server that is a reward source, with time-outs and retries."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ReadTimeoutError
from urllib3.util import Retry

from reward_model.models.text import Texts
from rlhf_ppo.chat.prompt import ChatPrompt
from rlhf_ppo.utils.redaction import redacted

_TRANSIENT = (429, 500, 502, 503, 504)
_FLOAT32_MAX = 3.4e38


class RewardServerTimeout(ConnectionError, TimeoutError):
    """The server took a request, and did not answer in time."""


class _RetryUnlessSlow(Retry):
    """Retries after failed connections and transient answers, not after time-outs: the server may still be working."""

    def increment(self, *args: Any, **details: Any) -> Any:
        """The retries that are left after one more failure; raise instead where there are none."""
        if isinstance(details.get("error"), ReadTimeoutError):
            raise details["error"]
        return super().increment(*args, **details)


class RemoteRewardModel:
    """A reward source that asks a server started by `python -m reward_model.serve`."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 0.5,
        batch_size: int = 128,
        concurrency: int = 4,
    ) -> None:
        """Set up the connection; nothing is sent yet.

        Args:
            url: The server's address, such as http://127.0.0.1:8018 (with or without /score).
            token: The server's token.
            timeout: Seconds to wait for the connection and for each answer, the server's queue included.
            retries: Further attempts after a failed one (no connection, status 429 or 5xx). After a time-out there is
                none: the server would have the same work to do again.
            backoff: Seconds before the second retry; doubled before each later one. A server's Retry-After counts more.
            batch_size: Samples in one request.
            concurrency: Maximum of simultaneous requests.

        Raises:
            ValueError: The address is not http(s), or a number is out of range.
        """
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"A reward URL begins with http:// or https://, got {url!r}.")
        if batch_size < 1 or concurrency < 1 or retries < 0 or timeout <= 0:
            raise ValueError(
                f"batch_size, concurrency >= 1, retries >= 0 and timeout > 0 are needed, got {batch_size}, "
                f"{concurrency}, {retries} and {timeout}."
            )
        self.url = url.rstrip("/").removesuffix("/score") + "/score"
        self.name = redacted(self.url)
        """The address for messages, without user and password."""
        self.timeout = timeout
        self.attempts = retries + 1
        self.batch_size = batch_size
        self.concurrency = concurrency
        retry = _RetryUnlessSlow(
            total=retries, backoff_factor=backoff, status_forcelist=_TRANSIENT, allowed_methods=["POST"],
            raise_on_status=False,
        )  # fmt: skip
        self._session = requests.Session()
        self._session.mount(self.url, HTTPAdapter(max_retries=retry, pool_maxsize=concurrency))
        self._session.headers.update({"Authorization": f"Bearer {token}"} if token else {})

    def __call__(
        self, prompts: Texts, responses: Texts, tools: Sequence[Any] | None = None, **_columns: Any
    ) -> list[float]:
        """Request one score per prompt-response text, in order; arguments as of `RewardModel`.

        Raises:
            ConnectionError: No usable answer after the last attempt; the message names server and reason.
            RewardServerTimeout: No answer in time; it is a ConnectionError and a TimeoutError.
            ValueError: The server refused the request, or sent the wrong number of scores.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"Each sample needs a prompt and a response, got {len(prompts)} and {len(responses)}.")
        columns: dict[str, Sequence[Any]] = {"prompts": prompts, "responses": responses}
        messages = [prompt.messages if isinstance(prompt, ChatPrompt) else None for prompt in prompts]
        columns |= {"messages": messages} if any(messages) else {}
        columns |= {"tools": tools} if tools is not None and any(tools) else {}
        starts = range(0, len(responses), self.batch_size)
        batches = [
            {name: list(column[start : start + self.batch_size]) for name, column in columns.items()}
            for start in starts
        ]
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            answers = [pool.submit(self._request, batch) for batch in batches]
            try:
                return [score for answer in answers for score in answer.result()]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # the other batches would be asked in vain
                raise

    def _request(self, body: dict[str, list[Any]]) -> list[float]:
        count = len(body["responses"])
        try:
            # A redirect would send texts, and perhaps the token, to another server.
            answer = self._session.post(self.url, json=body, timeout=self.timeout, allow_redirects=False)
        except requests.RequestException as error:
            if any(isinstance(reason, ReadTimeoutError) for reason in error.args):
                raise RewardServerTimeout(
                    f"The reward server {self.name} did not answer within {self.timeout:g} s (a time-out): it is "
                    f"there, but {count} samples, or the requests before them, took longer. Raise timeout, or "
                    "lower batch_size or concurrency. The request was not repeated."
                ) from None
            raise ConnectionError(
                f"The reward server {self.name} gave no answer in {self.attempts} attempts of {self.timeout:g} s: "
                f"{type(error).__name__}. Is `python -m reward_model.serve` running there?"
            ) from None  # its text holds the whole address, with a password if there is one
        if answer.status_code in _TRANSIENT:
            raise ConnectionError(
                f"The reward server {self.name} answered {answer.status_code} {self.attempts} times: {answer.text:.200}"
            )
        if answer.status_code != 200:
            raise ValueError(f"The reward server {self.name} refused ({answer.status_code}): {answer.text:.200}")
        return read_scores(answer.text, count, self.name)


def read_scores(body: str, count: int, url: str) -> list[float]:
    """The scores in a server's answer; a ValueError unless it is JSON with `count` finite numbers under "scores"."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The reward server {url} sent no JSON ({error}): {body:.200}") from error
    scores = content.get("scores") if isinstance(content, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        raise ValueError(f"The reward server {url} sent no {count} scores: {body:.200}")
    for index, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= _FLOAT32_MAX:
            raise ValueError(
                f"The reward server {url} sent {score!r:.80} as score {index} of {count}, expected a finite number: "
                "nothing can be learned from it. Repair the server, or let `TrainConfig.reward_failures` drop it."
            )
    return [float(score) for score in scores]
