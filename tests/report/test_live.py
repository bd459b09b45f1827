"""The live report: the page of a run that still trains, for this machine or for those who have the token."""

import http.client
import json
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import rlhf_ppo.report.page
from rlhf_ppo.report import RunFolder, serve_report
from rlhf_ppo.report.__main__ import main
from rlhf_ppo.report.live import LivePage


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds."""
    monkeypatch.setattr(rlhf_ppo.report.page, "draw_plots", lambda data: ([], []))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path / "run")
    folder.append_metrics(1, {"ppo/mean_scores": 0.25})
    return folder


@pytest.fixture
def url(run: RunFolder) -> Iterator[str]:
    with serve_report(run.path, title="Films") as address:
        yield address


def get(url: str, path: str = "/", **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
    parts = urlsplit(url)
    with closing(http.client.HTTPConnection(parts.hostname or "", parts.port)) as connection:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers


def test_the_page_shows_what_the_run_has_written_and_writes_nothing(run: RunFolder, url: str) -> None:
    before = sorted(path.name for path in run.path.iterdir())
    status, page, headers = get(url)
    assert status == 200 and "<h1>Films</h1>" in page and "1 iterations of training" in page
    assert "recorded so far" in page and "/live.js" in page
    assert "script-src 'self'" in headers["Content-Security-Policy"]
    assert get(url, "/live.js")[0] == 200
    assert sorted(path.name for path in run.path.iterdir()) == before


def test_the_page_is_drawn_again_only_when_the_run_has_written_more_and_only_so_often(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing that takes 1 s is done at most every 20 s: a twentieth of the time."""
    now, drawn = [0.0], []

    def draw(*_: object, **__: object) -> str:
        now[0] += 1.0
        drawn.append(now[0])
        return f"page {len(drawn)}"

    monkeypatch.setattr("rlhf_ppo.report.live.live_page", draw)
    monkeypatch.setattr("rlhf_ppo.report.live.time.monotonic", lambda: now[0])
    page = LivePage(run, "Films")
    assert page.html() == b"page 1"
    now[0] = 100.0
    assert page.html() == b"page 1"  # nothing new
    run.append_metrics(2, {"ppo/mean_scores": 0.5})
    assert page.html() == b"page 2"
    run.append_metrics(3, {"ppo/mean_scores": 0.5})
    now[0] = 101.0 + 19.0
    assert page.html() == b"page 2"
    now[0] = 101.0 + 20.0
    assert page.html() == b"page 3"


def test_signs_of_trouble_wait_until_there_is_something_to_judge(run: RunFolder, url: str) -> None:
    assert "automatic checks" not in get(url)[1]
    for iteration in range(2, 11):
        run.append_metrics(iteration, {"ppo/mean_scores": -float(iteration)})
    with serve_report(run.path, title="Films") as other:
        assert "The mean score did not rise" in get(other)[1]


def test_without_a_token_another_sites_name_for_this_machine_is_refused(url: str) -> None:
    """A site whose name is made to point to 127.0.0.1 could read the page through the user's browser."""
    assert get(url, Host="evil.example:8019")[0] == 403
    assert get(url, Host="localhost:8019")[0] == 200
    assert get(url, "/../config.json")[0] == 404


def test_other_machines_need_a_token(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="reached from other machines, but there is no token"):
        serve_report(run.path, title="", address="0.0.0.0:0").__enter__()
    monkeypatch.setenv("RLHF_PPO_LIVE_TOKEN", "s3cret")
    with serve_report(run.path, title="Films", address="0.0.0.0:0") as url:
        local = f"http://127.0.0.1:{urlsplit(url).port}/"
        status, _, headers = get(local)
        assert status == 401 and headers["WWW-Authenticate"].startswith("Basic")
        for wrong in ("Basic !", "Basic " + b64encode(b"me:wrong").decode(), "Bearer ", "Digest s3cret"):
            assert get(local, Authorization=wrong)[0] == 401
        for right in ("Basic " + b64encode(b"me:s3cret").decode(), "Bearer s3cret"):
            assert get(local, Authorization=right)[0] == 200


def test_a_second_run_takes_another_port_unless_one_was_asked_for(run: RunFolder, url: str) -> None:
    with serve_report(run.path, title="second") as other:
        assert other != url and "second" in get(other)[1]
        with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1"):
            serve_report(run.path, title="", address=urlsplit(other).netloc).__enter__()
    with pytest.raises(ValueError, match="must be HOST:PORT, such as"):
        serve_report(run.path, title="", address="somewhere").__enter__()


def test_the_command_serves_until_it_is_interrupted(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_ppo.report.__main__.wait_for_interrupt", interrupt)
    assert main([str(run.path), "--live-address", "127.0.0.1:0"]) == 0
    assert capsys.readouterr().out.startswith("live report: http://127.0.0.1:")
    assert not (run.path / "report.html").exists()
    assert json.loads((run.path / "metrics.jsonl").read_text())["iteration"] == 1
