"""Serve a reward model over HTTP: `python -m reward_model.serve MODEL`; see `--help`.

POST /score   {"prompts": [...], "responses": [...]}  ->  {"scores": [...]}
GET  /health                                          ->  {"status": "ok", "kind": ..., "base": ...}
"""

import hmac
import ipaddress
import json
import logging
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reward_model.commands import parse, run
from reward_model.documented import documented
from reward_model.ensemble import EnsembleRewardModel, load_reward_model
from reward_model.model import RewardModel
from reward_model.report_card import first_member

logger = logging.getLogger(__name__)


@documented
@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Reward model to serve, address, token and limits."""

    model: str
    """Folder of a reward model or an ensemble (or its first argument)."""
    host: str = "127.0.0.1"
    """Address to listen on; any but loopback needs a token."""
    port: int = 8018
    """Port to listen on."""
    token: str | None = field(default=None, repr=False)
    """Secret that requests must send as `Authorization: Bearer ...`; None takes REWARD_MODEL_TOKEN from the
    environment, and without that asks for none (loopback only)."""
    max_samples: int = 1024
    """Most samples in one request."""
    max_bytes: int = 16_000_000
    """Largest request body."""
    caution: float = 0.0
    """Standard deviations over the members that an ensemble's score is lowered by."""

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.secret:
            raise ValueError(
                f"host={self.host!r} can be reached from other machines, but there is no token: anyone could use the "
                "model. Set --token or REWARD_MODEL_TOKEN, or listen on 127.0.0.1."
            )
        for name in ("max_samples", "max_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}.")

    @property
    def secret(self) -> str | None:
        """The token, from the setting or the environment; arguments of a process can be read by every user."""
        return self.token or os.environ.get("REWARD_MODEL_TOKEN")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def application(model: RewardModel | EnsembleRewardModel, config: ServeConfig) -> Any:
    """Build the ASGI application; requests are scored one at a time.

    Raises:
        ImportError: Starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.requests import Request
        from starlette.responses import JSONResponse
        from starlette.routing import Route
    except ImportError as error:
        raise ImportError("Serving needs starlette and uvicorn: pip install 'rlhf_ppo[serve]'.") from error
    lock, secret = threading.Lock(), config.secret

    def scored(prompts: list[Any], responses: list[Any]) -> list[float]:
        with lock:
            return model(prompts, responses)

    def refuse(status: int, message: str) -> JSONResponse:
        return JSONResponse({"error": message}, status_code=status)

    async def score(request: Request) -> JSONResponse:
        if not authorized(request.headers.get("authorization"), secret):
            return refuse(401, "Send the server's token as `Authorization: Bearer TOKEN`.")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > config.max_bytes:
                return refuse(413, f"The body is larger than {config.max_bytes} bytes. Send smaller batches.")
        try:
            prompts, responses = parse_samples(bytes(body), config.max_samples)
            return JSONResponse({"scores": await run_in_threadpool(scored, prompts, responses)})
        except (ValueError, TypeError) as error:
            return refuse(400, str(error))

    async def health(_request: Request) -> JSONResponse:
        contract = first_member(model).contract
        return JSONResponse({"status": "ok", "base": contract.base, "tokenizer": contract.tokenizer_sha256[:12]})

    return Starlette(routes=[Route("/score", score, methods=["POST"]), Route("/health", health)])


def authorized(header: str | None, token: str | None) -> bool:
    """Whether the Authorization header has the token; compared in constant time."""
    return token is None or hmac.compare_digest((header or "").encode(), f"Bearer {token}".encode())


def parse_samples(body: bytes, max_samples: int) -> tuple[list[Any], list[Any]]:
    """Parse prompts and responses from the body of a request.

    Raises:
        ValueError: The body is no JSON, lacks a list, or has more than `max_samples` samples.
    """
    try:
        content = json.loads(body)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The body is not JSON: {error}.") from error
    if not isinstance(content, dict) or not all(isinstance(content.get(n), list) for n in ("prompts", "responses")):
        raise ValueError('The body must be {"prompts": [...], "responses": [...]}.')
    if len(content["responses"]) > max_samples:
        raise ValueError(f"At most {max_samples} samples in one request, got {len(content['responses'])}.")
    return content["prompts"], content["responses"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the model and serve until interrupted."""
    line = list(sys.argv[1:] if arguments is None else arguments)
    (config,) = parse(
        (ServeConfig,),
        ["--model", *line] if line and not line[0].startswith("-") else line,
        program="python -m reward_model.serve",
        description="Serve a reward model over HTTP (POST /score).",
    )
    app = application(load_reward_model(config.model, caution=config.caution), config)
    import uvicorn

    logger.info("Serving %s on http://%s:%d/score", config.model, config.host, config.port)
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning")


if __name__ == "__main__":
    run(main)
