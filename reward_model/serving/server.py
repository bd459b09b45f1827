"""Answer requests for scores over HTTP, as an ASGI application.

POST /score       {"prompts": [...], "responses": [...]}  ->  {"scores": [...]}
POST /get_reward  {"query": [...], "prompts": [...]}      ->  {"rewards": [...], "scores": [...]}, as OpenRLHF asks
GET  /health                                              ->  {"status": "ok", "kind": ..., "base": ...}

Bad input is answered with 400, a missing token with 401, too large a body with 413, too many requests with 429, each
with its reason under "error".
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

from reward_model.models.ensemble import EnsembleRewardModel, first_member
from reward_model.models.model import NonFiniteScoreError, RewardModel
from reward_model.serving.config import ServeConfig
from reward_model.serving.request_body import ParseBody, parse_queries, parse_samples
from reward_model.serving.request_queue import QueueFullError, RequestQueue
from rlhf_ppo.utils.access import is_authorized


class UnauthorizedError(Exception):
    """A request without the server's token."""


class BodyTooLargeError(Exception):
    """A request with a larger body than the server takes."""


def application(model: RewardModel | EnsembleRewardModel, config: ServeConfig) -> Any:
    """The ASGI application: scores requests one at a time, drops those of clients that leave, needs Starlette."""
    try:
        from starlette.applications import Starlette
        from starlette.responses import JSONResponse
        from starlette.routing import Route
    except ImportError as error:
        raise ImportError("Serving needs starlette and uvicorn: pip install 'rlhf_ppo[serve]'.") from error
    queue, secret = RequestQueue(max_waiting=config.max_waiting), config.secret

    async def scores_of(request: Any, parse: ParseBody) -> list[float]:
        if not is_authorized(request.headers.get("authorization"), secret):
            raise UnauthorizedError("Send the server's token as `Authorization: Bearer TOKEN`.")
        body = await read_body(request, config.max_bytes)
        arguments = parse(body, config.max_samples)
        key = hashlib.sha256(request.url.path.encode() + b" " + body).hexdigest()
        return await unless_client_leaves(request, queue.answer(key, lambda: model(**arguments)))

    async def score(request: Any) -> Any:
        return JSONResponse({"scores": await scores_of(request, parse_samples)})

    async def get_reward(request: Any) -> Any:
        scores = await scores_of(request, parse_queries)
        return JSONResponse({"rewards": scores, "scores": scores, "extra_logs": {}})

    async def health(_request: Any) -> Any:
        return JSONResponse(health_of(model))

    posts = [Route("/score", score, methods=["POST"]), Route("/get_reward", get_reward, methods=["POST"])]
    return Starlette(routes=[*posts, Route("/health", health)], exception_handlers=error_handlers())


def error_handlers() -> dict[Any, Any]:
    """How each error is answered: its status, and its text as the reason."""
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse

    def refusal(status: int, **headers: str) -> Callable[[Any, Exception], Any]:
        return lambda _, error: JSONResponse({"error": str(error)}, status_code=status, headers=headers)

    return {
        UnauthorizedError: refusal(401),
        BodyTooLargeError: refusal(413),
        QueueFullError: refusal(429, **{"Retry-After": "1"}),
        NonFiniteScoreError: refusal(500),
        ValueError: refusal(400),
        TypeError: refusal(400),
        ClientDisconnect: refusal(499),  # for the log: nobody reads it
    }


def health_of(model: RewardModel | EnsembleRewardModel) -> dict[str, str]:
    """The answer of /health: which reward model is served."""
    contract = first_member(model).contract
    return {
        "status": "ok",
        "kind": "ensemble" if isinstance(model, EnsembleRewardModel) else "single",
        "base": contract.base,
        "template": contract.text.template,
        "tokenizer": contract.tokenizer_sha256[:12],
    }


async def read_body(request: Any, max_bytes: int) -> bytes:
    """The body of a request.

    The rest of a body that is too large is read and thrown away, up to ten times the limit: a client that still sends
    would see a broken connection instead of the reason.

    Raises:
        BodyTooLargeError: It is larger than `max_bytes`.
    """
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= max_bytes:
            body += chunk
        elif size > 10 * max_bytes:
            break
    if size > max_bytes:
        raise BodyTooLargeError(f"The body is larger than {max_bytes} bytes. Send smaller batches.")
    return bytes(body)


async def unless_client_leaves(request: Any, answer: Awaitable[list[float]]) -> list[float]:
    """Wait for the answer, or until the client closes its connection.

    Raises:
        ClientDisconnect: The client has left; the answer is cancelled.
    """
    from starlette.requests import ClientDisconnect

    async def client_leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(client_leaves())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        raise ClientDisconnect
    finally:
        answering.cancel()
        leaving.cancel()
