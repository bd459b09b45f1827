"""The server under load: slow, broken and departed clients cost the others nothing, and no model run is wasted."""

import http.client
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from reward_model import RewardModel
from reward_model.serving.client import RemoteRewardModel, RewardServerTimeout
from tests.reward_model.conftest import serving
from tests.support.patience import PATIENCE


class CountedModel(RewardModel):
    """Scores a text by its length, counts its runs, and runs only while the gate is open."""

    def __init__(self, model: RewardModel) -> None:
        self.contract = model.contract
        self.runs: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, prompts: Any, responses: Any, **_: Any) -> list[float]:
        self.runs.append(responses[0])
        assert self.gate.wait(PATIENCE)
        return [float(len(text)) for text in responses]


@pytest.fixture
def counted(reward_model: RewardModel) -> CountedModel:
    return CountedModel(reward_model)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def body_of(text: str) -> bytes:
    return json.dumps({"prompts": ["a"], "responses": [text]}).encode()


def send_and_leave(url: str, body: bytes) -> None:
    """Send a whole request, and close the connection without waiting for its answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", "/score", body, {"Content-Type": "application/json"})
    connection.close()


def ask(url: str, text: str) -> Any:
    return requests.post(f"{url}/score", data=body_of(text), timeout=PATIENCE).json()


def test_a_request_whose_client_has_left_is_not_scored(counted: CountedModel) -> None:
    with serving(counted) as url, ThreadPoolExecutor(2) as pool:
        counted.gate.clear()
        first = pool.submit(ask, url, "first")
        until(lambda: counted.runs == ["first"])
        send_and_leave(url, body_of("abandoned"))
        last = pool.submit(ask, url, "a longer one")
        for _ in range(3):  # what the server answers after the departure shows that it has seen it
            assert requests.get(f"{url}/health", timeout=PATIENCE).ok
        counted.gate.set()
        assert first.result() == {"scores": [5.0]} and last.result() == {"scores": [12.0]}
    assert counted.runs == ["first", "a longer one"]


def test_a_client_that_timed_out_says_so_and_its_next_try_costs_no_run(counted: CountedModel) -> None:
    """Two questions, four tries: two model runs."""
    with serving(counted) as url:
        counted.gate.clear()
        hasty = RemoteRewardModel(url, timeout=0.2, retries=4, backoff=0.01, batch_size=1, concurrency=2)
        for _ in range(2):
            with pytest.raises(RewardServerTimeout, match=r"within 0\.2 s \(a time-out\).*Raise timeout"):
                hasty(["a", "a"], ["one", "three"])
        counted.gate.set()
        patient = RemoteRewardModel(url, timeout=PATIENCE, batch_size=1)
        assert patient(["a", "a"], ["one", "three"]) == [3.0, 5.0]
    assert sorted(counted.runs) == ["one", "three"]


def test_an_answer_is_kept_since_its_client_may_have_left_before_it(counted: CountedModel) -> None:
    """A departure that the server sees only after it has answered: the next try costs no run either."""
    with serving(counted) as url:
        assert ask(url, "one") == ask(url, "one") == {"scores": [3.0]}
    assert counted.runs == ["one"]


def test_a_full_queue_is_answered_429_and_asked_again(counted: CountedModel) -> None:
    with serving(counted, max_waiting=1) as url, ThreadPoolExecutor(1) as pool:
        counted.gate.clear()
        first = pool.submit(ask, url, "first")
        until(lambda: counted.runs == ["first"])
        refused = requests.post(f"{url}/score", data=body_of("second"), timeout=PATIENCE)
        assert refused.status_code == 429 and refused.headers["Retry-After"] == "1"
        assert "wait" in refused.json()["error"]
        counted.gate.set()
        assert first.result() == {"scores": [5.0]}
        assert RemoteRewardModel(url)(["a"], ["second"]) == [6.0]


def client(url: str, number: int, count: int, answered: list[str]) -> None:
    """`count` requests: of ten, one is sent slowly, one is broken, one is abandoned; all others must be right."""
    for index in range(count):
        text, kind = f"{number} {'x' * index}", index % 10
        if kind == 3:
            send_and_leave(url, body_of(text))
            continue
        if kind == 6:
            broken = [b"{", b'{"prompts": 1}', b"[" * 3_000, b"\xff", b'{"prompts": ["a"], "responses": []'][index % 5]
            assert requests.post(f"{url}/score", data=broken, timeout=PATIENCE).status_code == 400
            continue
        body = body_of(text)
        slowly = (part for part in (body[:7], time.sleep(0.02) or body[7:]))
        answer = requests.post(f"{url}/score", data=slowly if kind == 9 else body, timeout=PATIENCE)
        assert answer.json() == {"scores": [float(len(text))]}
        answered.append(text)


def load(counted: CountedModel, *, clients: int, count: int) -> None:
    answered: list[str] = []
    with serving(counted) as url, ThreadPoolExecutor(clients) as pool:
        for job in [pool.submit(client, url, number, count, answered) for number in range(clients)]:
            job.result()
    assert set(answered) <= set(counted.runs), "every answer had a run of its own"
    assert len(answered) == clients * count * 8 // 10


def test_four_clients_get_right_scores(counted: CountedModel) -> None:
    load(counted, clients=4, count=20)


@pytest.mark.slow
def test_eight_clients_of_three_hundred_requests_get_right_scores_and_no_run_is_wasted(counted: CountedModel) -> None:
    load(counted, clients=8, count=300)
    assert len(counted.runs) <= 1.05 * 8 * 300 * 0.8
