"""The report: one page that needs nothing else, true to the folder, and unimpressed by what is missing or broken."""

import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import rlhf_ppo.report.page
from rlhf_ppo.report import RunFolder, Sample, TokenTrace, write_report
from rlhf_ppo.report.__main__ import main
from rlhf_ppo.report.plots import draw_plots, smoothed
from rlhf_ppo.report.run_data import read_run
from rlhf_ppo.report.summary import evaluation_rows, findings, headline, span, tiles
from rlhf_ppo.report.token_view import token_view
from rlhf_ppo.report.wording import decimals_for, format_number, format_with_error
from tests.report.synthetic import write_synthetic_run

ALL_PLOTS = {"reward", "kl", "entropy", "length", "value", "update", "frontier", "scores"}


class Page(HTMLParser):
    """Collects what a test asks about a page, and that its tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in {"src", "srcset", "href"}]
        if tag not in {"meta", "input", "img", "source", "link"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "films"
    write_synthetic_run(folder, steps=60, samples=16)
    write_report(folder, title="Films & <friends>")
    return folder


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds; most tests are about the rest."""
    monkeypatch.setattr(rlhf_ppo.report.page, "draw_plots", lambda data: ([], []))


def test_the_page_asks_the_network_for_nothing(reported: Path) -> None:
    html = (reported / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert not re.search(r"https?:|@import|url\(|<script", html)
    assert sum(address.startswith("data:") for address in page.addresses) == 2 * len(ALL_PLOTS)  # light and dark


def test_every_plot_lies_in_the_folder_too(reported: Path) -> None:
    plots = {path.stem: path.read_bytes() for path in (reported / "plots").iterdir()}
    assert plots.keys() == ALL_PLOTS
    assert all(content.startswith(b"\x89PNG") for content in plots.values())


def test_the_page_says_what_the_folder_says(reported: Path) -> None:
    text = " ".join(Page((reported / "report.html").read_text()).text.split())
    assert "Films & <friends>" in text
    assert "60 iterations of training. On held-out prompts VADER compound rose from 0.20 ± 0.02 to 0.67 ± 0.02" in text
    assert "KL of 7.4 ± 0.1 nats per response" in text
    assert "The first 6 of 16, not chosen" in text
    assert "ppo.clip_range" in text
    assert "words per line" in text  # A metric that the report has never heard of.


@pytest.mark.usefixtures("no_plots")
def test_texts_of_the_policy_cannot_become_markup(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path)
    evil = "<script>alert(1)</script>"
    run.write_samples([Sample(prompt=evil, before="| a | b |", after=evil, after_scores={evil: 1.0})])
    run.append_tokens(
        [
            TokenTrace(
                iteration=1, prompt=evil, score=0.0, tokens=[evil], logprobs=[0], kl=[0], values=[0], advantages=[0]
            )
        ]
    )
    run.write_config({"a|b\n# c": evil})
    html = write_report(tmp_path, title=evil).read_text()
    assert "<script" not in html
    assert evil in Page(html).text
    card = (tmp_path / "README.md").read_text()
    assert "| a\\|b # c | \\<script\\>alert(1)\\</script\\> |" in card


def test_the_card_has_the_hubs_header_and_a_row_per_metric(reported: Path) -> None:
    _, header, body = (reported / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/gpt2-reviews",
        "tags": ["reinforcement-learning", "rlhf", "ppo", "rlhf_ppo"],
    }
    assert "| VADER compound | 0.20 ± 0.02 | 0.67 ± 0.02 | +0.47 ± 0.03 |" in body
    assert "No model was saved" in body
    assert all((reported / path).exists() for path in re.findall(r"!\[.*?\]\((.*?)\)", body))


@pytest.mark.usefixtures("no_plots")
def test_the_card_says_how_to_load_the_model_that_is_there(tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "films", steps=2, samples=0)
    run.write_bytes("checkpoints/model.safetensors", b"")
    run.write_bytes("model/model.safetensors", b"")
    run.write_config({"model": "/somewhere/local"})
    write_report(run.path, title="Films")
    card = (run.path / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("films/model")' in card
    assert "base_model" not in card


def test_an_empty_folder_makes_a_page_of_plain_sentences(tmp_path: Path) -> None:
    text = Page(write_report(tmp_path, title="Nothing").read_text()).text
    for sentence in (
        "No training metrics were recorded.",
        "No held-out evaluation was recorded in this run.",
        "No held-out samples were recorded in this run.",
        "No token traces were recorded in this run.",
        "No settings were recorded in this run.",
    ):
        assert sentence in text
    assert "Not recorded in this run: reward, kl to the reference" in text
    assert "None of the automatic checks" not in text


@pytest.mark.usefixtures("no_plots")
def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path, steps=3, samples=4)
    for name in ("config.json", "evaluation.json"):
        (tmp_path / name).write_text("{")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("{")
    text = Page(write_report(tmp_path, title="Damaged").read_text()).text
    assert "config.json is no JSON" in text
    assert "evaluation.json is no JSON" in text
    assert "1 of the lines in metrics.jsonl could not be read" in text
    assert "3 iterations of training: mean score" in text
    assert len(run.samples()) == 4


def test_without_matplotlib_the_page_comes_without_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic_run(tmp_path, steps=3, samples=4)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = Page(write_report(tmp_path, title="Plain").read_text()).text
    assert "Plots need matplotlib" in text
    assert "VADER compound" in text


def test_metrics_that_are_nan_throughout_are_not_plotted(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for iteration in range(3):
        run.append_metrics(iteration, {"ppo/mean_scores": math.nan, "objective/kl": 1.0})
    plots, missing = draw_plots(read_run(run))
    assert [plot.name for plot in plots] == ["kl"]
    assert "Reward" in missing
    assert "Reward against KL" in missing


@pytest.mark.slow
def test_a_report_written_again_replaces_the_first(reported: Path) -> None:
    before = {path: path.read_bytes() for path in reported.rglob("*") if path.is_file()}
    write_report(reported, title="Films & <friends>")
    assert {path: path.read_bytes() for path in reported.rglob("*") if path.is_file()} == before


def test_each_sign_of_trouble_is_reported_with_its_number(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    bad = {
        "objective/kl": -5.0, "ppo/mean_scores": 1.0, "ppo/val/var_explained": -0.2, "ppo/policy/clipfrac": 0.4,
        "ppo/updates_skipped": 2.0,
    }  # fmt: skip
    for iteration in range(3):
        run.append_metrics(iteration, bad)
    run.write_evaluation(before={"distinct_2": (0.9, 0.01)}, after={"distinct_2": (0.3, 0.01)})
    text = "\n".join(findings(read_run(run)))
    for sign in ("−5.00 nats", "score did not rise", "−0.200", "40.0 %", "6 updates", "from 0.900 to 0.300"):
        assert sign in text


def test_a_healthy_run_has_no_findings_and_its_ends_are_means_over_a_tenth(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for iteration in range(20):
        run.append_metrics(iteration, {"ppo/mean_scores": float(iteration), "objective/kl": 1.0})
    data = read_run(run)
    assert findings(data) == []
    assert span(data, "ppo/mean_scores") == (0.5, 18.5)
    assert headline(data) == "20 iterations of training: mean score 0.500 → 18.5."
    assert [tile.value for tile in tiles(data)] == ["18.5", "1.00"]


def test_a_mean_near_zero_is_shown_in_a_tile_without_exponent_and_sign(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_evaluation(before={"score": (-3.7e-4, 0.034)}, after={"score": (1.68, 0.03)})
    assert [(tile.value, tile.detail) for tile in tiles(read_run(run))] == [("1.68", "before 0.000")]


def test_the_error_of_a_change_is_that_of_a_difference(tmp_path: Path) -> None:
    """√(0.3² + 0.4²) = 0.5."""
    run = RunFolder(tmp_path)
    run.write_evaluation(before={"score": (5.0, 0.3), "x": (1.0, math.nan)}, after={"score": (2.0, 0.4)})
    rows = {row.metric: row for row in evaluation_rows(read_run(run))}
    assert rows["score"].change == "−3.0 ± 0.5"
    assert (rows["x"].before, rows["x"].after, rows["x"].change) == ("1.000", "–", "–")


def test_one_scale_colors_all_tokens_and_the_latest_responses_come_first() -> None:
    def trace(iteration: int, kl: list[float]) -> TokenTrace:
        zeros = [0.0] * len(kl)
        return TokenTrace(
            iteration=iteration, prompt="", score=0.0, tokens=["\n"] * len(kl), logprobs=zeros, kl=kl, values=zeros,
            advantages=zeros,
        )  # fmt: skip

    responses, scales = token_view([trace(1, [2.0, -1.0]), trace(2, [math.nan, -2.0])])
    assert [response.iteration for response in responses] == [2, 1]
    assert [token.heat["kl"] for response in responses for token in response.tokens] == [0.0, -1.0, 1.0, -0.5]
    assert scales["kl"] == "2.00"
    assert scales["values"] == "0.000"
    assert responses[0].tokens[0].text == "⏎\n"


def test_smoothing_keeps_a_constant_and_averages_its_window() -> None:
    assert smoothed([2.0] * 7, window=4) == [2.0] * 7
    assert smoothed([0.0, 3.0, 6.0, 0.0], window=3) == [1.5, 3.0, 3.0, 3.0]


def test_numbers_are_short() -> None:
    shown = [format_number(value) for value in (0.0, -0.12345, 1.2345, 12.345, 1234.5, 0.00001, math.nan)]
    assert shown == ["0.000", "−0.123", "1.23", "12.3", "1,234", "1.00e−05", "–"]
    assert decimals_for(0.022, 0.009, math.nan) == 3
    assert format_with_error(-0.5, 0.02, decimals=2) == "−0.50 ± 0.02"


@pytest.mark.usefixtures("no_plots")
def test_the_command_writes_the_page_and_prints_where(reported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(reported), "--title", "By hand"]) == 0
    assert capsys.readouterr().out.strip() == str(reported / "report.html")
    assert "By hand" in (reported / "report.html").read_text()


def test_the_command_answers_a_missing_folder_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: There is no run folder")
    assert error.count("\n") == 1


@pytest.mark.usefixtures("no_plots")
def test_settings_show_what_json_holds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"a": {"b": [1, 2], "c": {}}, "d": True, "e": None}))
    text = Page(write_report(tmp_path, title="T").read_text()).text
    assert text.split("4 settings")[1].split("Run folder")[0].split() == ["a.b1,", "2", "a.c–", "dyes", "e–"]
