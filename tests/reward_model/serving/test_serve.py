"""The HTTP path: the same scores as the local one, and clear refusals."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
import requests

from reward_model import RewardModel
from reward_model.models.ensemble import EnsembleRewardModel
from reward_model.serving.client import RemoteRewardModel, read_scores
from reward_model.serving.config import ServeConfig
from reward_model.serving.server import health_of
from tests.reward_model.conftest import serving
from tests.support.patience import PATIENCE

PROMPTS = ["The movie was "] * 5
RESPONSES = ["great", "awful and boring", "lovely good", "", "naïve 🙂"]


@pytest.fixture
def server(reward_model: RewardModel) -> Iterator[str]:
    """A real server on a free loopback port, with a token and small limits."""
    with serving(reward_model, token="secret", max_samples=4, max_bytes=4_000) as url:
        yield url


def test_http_scores_equal_local_scores(server: str, reward_model: RewardModel) -> None:
    remote = RemoteRewardModel(server, token="secret", batch_size=2, concurrency=2)
    assert remote(prompts=PROMPTS, responses=RESPONSES) == pytest.approx(reward_model(PROMPTS, RESPONSES), abs=1e-5)
    assert remote([], []) == []


def test_requests_that_must_not_pass_are_refused_with_a_reason(server: str) -> None:
    def post(body: Any, token: str = "secret") -> requests.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return requests.post(
            f"{server}/score", data=data, headers={"Authorization": f"Bearer {token}"}, timeout=PATIENCE
        )

    good = {"prompts": ["a"], "responses": ["b"]}
    assert post(good).status_code == 200
    assert post(good, token="wrong").status_code == 401
    assert requests.post(f"{server}/score", json=good, timeout=PATIENCE).status_code == 401
    assert post(b"x" * 5_000).status_code == 413
    assert post(b"\xff{").status_code == 400
    assert "prompts" in post({"prompts": "a"}).json()["error"]
    assert "At most 4 samples" in post({"prompts": ["a"] * 5, "responses": ["b"] * 5}).json()["error"]
    assert "got 1 and 2" in post({"prompts": ["a"], "responses": ["b", "c"]}).json()["error"]
    assert "responses[0] must be a text" in post({"prompts": ["a"], "responses": [5]}).json()["error"]
    too_deep = b'{"prompts": ' + b"[" * 1_500 + b"]" * 1_500 + b', "responses": []}'
    refused = post(too_deep)
    # Python 3.14 parses as deep as the stack goes: the request is refused for its number of responses then.
    assert refused.status_code == 400 and ("too deeply" in (error := refused.json()["error"]) or "got 1 and 0" in error)


def test_health_names_the_kind_of_model(server: str, reward_model: RewardModel) -> None:
    health = requests.get(f"{server}/health", timeout=PATIENCE).json()
    assert health["status"] == "ok" and health["kind"] == "single" and health["template"] == "plain"
    assert health_of(EnsembleRewardModel([reward_model, reward_model]))["kind"] == "ensemble"


def test_a_body_that_is_too_large_reaches_the_client_as_a_refusal(server: str) -> None:
    """The client is still sending when the server has seen enough."""
    with pytest.raises(ValueError, match=r"refused \(413\).*larger than 4000 bytes"):
        RemoteRewardModel(server, token="secret", retries=0)(["a"], ["b" * 30_000])


def test_a_refusal_reaches_the_caller(server: str) -> None:
    with pytest.raises(ValueError, match="refused \\(401\\)"):
        RemoteRewardModel(server, token="wrong", retries=0)(["a"], ["b"])


def test_other_machines_need_a_token() -> None:
    assert all(ServeConfig(model="-", host=host).token is None for host in ("127.0.0.1", "::1", "localhost"))
    with pytest.raises(ValueError, match="no token"):
        ServeConfig(model="-", host="0.0.0.0")
    assert ServeConfig(model="-", host="0.0.0.0", token="secret").token == "secret"


class Flaky(BaseHTTPRequestHandler):
    """Answers 503 a few times before it answers well."""

    failures = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        failing = Flaky.failures > 0
        Flaky.failures -= 1
        body = b"busy" if failing else b'{"scores": [1.5]}'
        self.send_response(503 if failing else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Silence."""


@pytest.fixture
def flaky() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Flaky)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(timeout=PATIENCE)


def test_a_busy_server_is_asked_again_and_given_up_after_the_last_attempt(flaky: str) -> None:
    remote = RemoteRewardModel(flaky, retries=2, backoff=0.01)
    Flaky.failures = 2
    assert remote(["a"], ["b"]) == [1.5]
    Flaky.failures = 3
    with pytest.raises(ConnectionError, match="answered 503 3 times"):
        remote(["a"], ["b"])


def test_no_server_is_an_error_that_names_it() -> None:
    with pytest.raises(ConnectionError, match="no answer in 2 attempts"):
        RemoteRewardModel("http://127.0.0.1:9", retries=1, backoff=0.01, timeout=1)(["a"], ["b"])
    with pytest.raises(ValueError, match="begins with http"):
        RemoteRewardModel("ftp://x")


LIES = ["", "<html>", "[1.0]", "{}", '{"scores": 1}', '{"scores": []}', '{"scores": [null]}', '{"scores": ["1"]}']
LIES += ['{"scores": [NaN]}', '{"scores": [1e999]}', '{"scores": [true]}', '{"scores": [[1]]}', "[" * 100_000]


@pytest.mark.parametrize("body", LIES)
def test_an_answer_that_is_no_score_is_an_error_that_names_the_server(body: str) -> None:
    with pytest.raises(ValueError, match="The reward server http://there sent "):
        read_scores(body, 1, "http://there")
