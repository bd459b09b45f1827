"""The report and the live page in a real browser: headless Chromium, driven by Playwright."""

import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_ppo.report import RunFolder, serve_report, write_report
from tests.report.synthetic import metrics_at, write_synthetic_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path (Debian: apt install chromium)"),
]
SCREENS = [(width, scheme) for width in (400, 1400) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_synthetic_run(tmp_path_factory.mktemp("browser") / "films", steps=60, samples=16)


@pytest.fixture(scope="module")
def report(run: RunFolder) -> str:
    return write_report(run.path, title="Films").as_uri()


@pytest.fixture(scope="module")
def live(run: RunFolder) -> Iterator[str]:
    with serve_report(run.path, title="Films") as url:
        yield url


def open_page(browser: Any, url: str, width: int, scheme: str) -> tuple[Any, list[str]]:
    """A page, and a list to which its errors and warnings on the console are added."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(url, wait_until="load")
    return page, said


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
@pytest.mark.parametrize("kind", ["report", "live"])
def test_the_page_loads_without_an_error_and_fits_the_screen(
    browser: Any, kind: str, width: int, scheme: str, request: pytest.FixtureRequest
) -> None:
    page, said = open_page(browser, request.getfixturevalue(kind), width, scheme)
    for item in page.locator("details").all():
        item.evaluate("item => item.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.eval_on_selector_all("figure img", "images => images.map(i => [i.naturalWidth, i.clientWidth])")
    assert len(sizes) == 8 and all(natural > 0 and shown > 200 for natural, shown in sizes)
    dark_ink = page.evaluate("getComputedStyle(document.body).color") == "rgb(230, 234, 241)"
    assert dark_ink == (scheme == "dark")
    chosen = page.eval_on_selector_all("figure img", "images => new Set(images.map(i => i.currentSrc)).size")
    assert chosen == 8
    assert said == []
    page.close()


def test_the_keyboard_chooses_what_colors_the_tokens(browser: Any, report: str) -> None:
    page, _ = open_page(browser, report, 1400, "light")
    page.get_by_role("radio", name="KL").focus()
    assert page.locator(".heat-kl").is_visible() and page.locator(".heat-kl .stream span").count() > 20
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="Advantage").is_checked()
    assert page.locator(".heat-advantages").is_visible() and not page.locator(".heat-kl").is_visible()
    page.locator("#token-numbers summary").focus()
    page.keyboard.press("Enter")
    assert page.locator("#token-numbers table").first.is_visible()
    page.close()


def test_a_screen_reader_finds_named_parts(browser: Any, live: str) -> None:
    page, _ = open_page(browser, live, 1400, "light")
    tree = page.locator("body").aria_snapshot()
    for part in (
        'heading "Films" [level=1]', 'navigation "Sections"', 'group "Color by"', 'radio "Log-probability"',
        'img "Reward: score from', 'region "Held-out evaluation"', 'checkbox "Refresh while the run trains" [checked]',
        "status",
    ):  # fmt: skip
        assert part in tree, part
    assert page.evaluate("document.documentElement.lang") == "en"
    page.close()


def test_the_live_page_follows_the_run_and_keeps_what_the_reader_has_chosen(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ppo.report.live.DRAWING_SHARE", math.inf)  # no pause between two drawings
    run = write_synthetic_run(tmp_path / "films", steps=3, samples=16)
    with serve_report(run.path, title="Films") as url:
        page, said = open_page(browser, url, 1400, "light")
        page.clock.install()
        page.reload()
        assert "3 iterations of training" in page.inner_text(".lead")
        page.get_by_role("radio", name="Value").check(force=True)
        page.locator("#all-settings summary").click()
        run.append_metrics(4, metrics_at(4, 60, random.Random(0)))
        page.clock.run_for(10_000)
        page.get_by_text("4 iterations of training").wait_for()
        assert page.get_by_role("radio", name="Value").is_checked()
        assert page.locator("#all-settings").evaluate("item => item.open")
        assert said == []
    page.clock.run_for(10_000)
    page.get_by_text("The server no longer answers").wait_for()
    page.close()
