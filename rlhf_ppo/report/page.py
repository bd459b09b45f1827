"""Report page of a run: one self-contained HTML file, light and dark, readable on a phone."""

import base64
from collections.abc import Sequence
from pathlib import Path

from rlhf_ppo.loop.run_folder import RunFolder, Sample
from rlhf_ppo.report.model_card import model_card
from rlhf_ppo.report.plots import DARK, LIGHT, Plot, draw_plots
from rlhf_ppo.report.run_data import RunData, read_run
from rlhf_ppo.report.settings import setting_rows
from rlhf_ppo.report.summary import JUDGES, evaluation_rows, findings, headline, tiles
from rlhf_ppo.report.templates import render
from rlhf_ppo.report.token_view import QUANTITIES, token_view
from rlhf_ppo.report.wording import format_number, metric_label

FIRST_SAMPLES = 6
EXTREME_SAMPLES = 3
FIRST_JUDGED = 10
"""Iterations after which the signs of trouble are shown on the page of a run that still trains."""
CARD_PLOTS = ("reward", "kl", "frontier")


def write_report(run_dir: Path | str, *, title: str) -> Path:
    """Write plots/*.png, README.md (the model card) and report.html into a run folder.

    The page lists what the folder lacks. Running it again replaces the files.

    Args:
        run_dir: the folder that training wrote into.
        title: heading of the page and of the model card.

    Returns:
        The path of report.html.

    Raises:
        RunFolderError: there is no such folder.
    """
    run = RunFolder.open(run_dir)
    data = read_run(run)
    plots, missing = _plots(data)
    for plot in plots:
        run.write_bytes(f"plots/{plot.name}.png", plot.light)
    shown = [(plot.title, f"plots/{plot.name}.png") for plot in plots if plot.name in CARD_PLOTS]
    run.write_text("README.md", model_card(data, title=title, plots=shown))
    return run.write_text("report.html", _page(data, title, plots, missing))


def live_page(run: RunFolder, *, title: str) -> str:
    """Render the page of a run that still trains; nothing is written."""
    data = read_run(run)
    return _page(data, title, *_plots(data), is_live=True)


def _plots(data: RunData) -> tuple[list[Plot], list[str]]:
    """The plots, and titles of those without data; without matplotlib none, and a note in `data`."""
    try:
        return draw_plots(data)
    except ImportError:
        data.notes.append("Plots need matplotlib: pip install matplotlib, then write the report again.")
        return [], []


def _page(data: RunData, title: str, plots: Sequence[Plot], missing: Sequence[str], *, is_live: bool = False) -> str:
    is_judged = bool(data.after) or len(data.metrics) >= (FIRST_JUDGED if is_live else 1)
    first, risen, fallen = _select_samples(data.samples)
    responses, scales = token_view(data.tokens)
    return render(
        "report.html.j2",
        light=LIGHT,
        dark=DARK,
        title=title,
        headline=headline(data),
        tiles=tiles(data),
        notes=data.notes,
        is_live=is_live,
        findings=findings(data) if is_judged else [],
        judged=is_judged,
        evaluation=evaluation_rows(data),
        plots=[(plot, _data_uri(plot.light), _data_uri(plot.dark)) for plot in plots],
        missing=missing,
        sample_count=len(data.samples),
        sample_groups=[
            (f"The first {len(first)} of {len(data.samples)}, not chosen", first, True),
            (f"The {len(risen)} that rose most", risen, False),
            (f"The {len(fallen)} that fell most", fallen, False),
        ],
        judge=metric_label(_judge(data.samples)),
        metric_label=metric_label,
        format_number=format_number,
        responses=responses,
        quantities=QUANTITIES,
        scales=scales,
        settings=setting_rows(data.config),
        name=data.name,
    )


def _select_samples(samples: Sequence[Sample]) -> tuple[Sequence[Sample], ...]:
    """Select the first samples, and those whose score by the judge rose and fell most."""
    judge = _judge(samples)
    changes = [
        (sample.after_scores[judge] - sample.before_scores[judge], index)
        for index, sample in enumerate(samples)
        if judge in sample.before_scores and judge in sample.after_scores
    ]
    risen = sorted((change for change in changes if change[0] > 0), reverse=True)[:EXTREME_SAMPLES]
    fallen = sorted(change for change in changes if change[0] < 0)[:EXTREME_SAMPLES]
    return samples[:FIRST_SAMPLES], [samples[index] for _, index in risen], [samples[index] for _, index in fallen]


def _judge(samples: Sequence[Sample]) -> str:
    """Judge by which samples are ranked: an independent one if there is one, else the training reward."""
    names = [name for sample in samples[:1] for name in sample.after_scores]
    return next((name for name in (*JUDGES, *names) if name in names), "")


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
