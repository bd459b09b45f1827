"""Write the report card as text for the terminal and as an HTML page with figures."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p { margin: .3rem 0; max-width: 46rem; } .note { color: #5b6675; }
table { border-collapse: collapse; margin: .4rem 0; } th { text-align: left; font-weight: 600; }
td, th { padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid #e4e8ee; font-variant-numeric: tabular-nums; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.tile { border: 1px solid #d9dee6; border-radius: 6px; padding: .5rem .9rem; min-width: 8rem; }
.tile b { display: block; font-size: 1.35rem; } img { max-width: 100%; height: auto; }
"""


def format_share(value: Mapping[str, Any]) -> str:
    """Format a share with its confidence interval, in percent."""
    if not value["count"]:
        return "no pairs"
    return f"{value['value']:.1%} [{value['low']:.1%}, {value['high']:.1%}], n = {value['count']}"


def _shares(table: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(name, format_share(row)) for name, row in table.items()]


def text_table(card: Mapping[str, Any]) -> str:
    """The card as aligned lines."""
    sections = _sections(card)
    width = max(len(name) for _, rows in sections for name, _ in rows)
    lines = []
    for title, rows in sections:
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
    return "\n".join(lines)


def html_page(card: Mapping[str, Any], *, title: str, facts: Mapping[str, str]) -> str:
    """The report card as one HTML page: headline numbers, figures and tables."""
    accuracy = card["accuracy"]
    tiles = {
        "held-out accuracy": f"{accuracy['value']:.1%}",
        "95 % interval": f"{accuracy['low']:.1%} to {accuracy['high']:.1%}",
        "pairs": f"{card['pairs']:,}",
        "calibration error": f"{card['calibration']['ece']:.3f}",
        "log loss (coin: 0.693)": f"{card['log_loss']:.3f}",
    }
    boxes = "".join(f"<div class=tile>{html.escape(name)}<b>{value}</b></div>" for name, value in tiles.items())
    sections = "".join(_html_section(name, rows) for name, rows in _sections(card))
    origin = _html_section("Model", list(facts.items()))
    figures = base64.b64encode(draw_figures(card)).decode()
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><p class=note>Reward model report card: held-out comparisons, ties left out of "
        f"accuracies, intervals at 95 %.</p><div class=tiles>{boxes}</div>"
        f'<img alt="Reliability, scores, accuracy by length, training" src="data:image/png;base64,{figures}">'
        f"{sections}{origin}</html>\n"
    )


def draw_figures(card: Mapping[str, Any]) -> bytes:
    """Reliability, scores, accuracy by length and, where they are known, best-of-N and training curves, as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The report card's page needs matplotlib: pip install matplotlib, or --page none.") from error
    curve, training = card.get("best_of_n"), card.get("training")
    count = 3 + bool(curve) + bool(training)
    figure = Figure(figsize=(3 * count + 3, 3.6), layout="constrained", dpi=110)
    axes = figure.subplots(1, count)
    _draw_reliability(axes[0], card["calibration"]["reliability"])
    _draw_histogram(axes[1], card["scores"])
    _draw_lengths(axes[2], card["by_length"])
    if curve:
        _draw_best_of_n(axes[3], curve)
    if training:
        _draw_training(axes[-1], training)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write_page(card: Mapping[str, Any], path: Path, *, title: str, facts: Mapping[str, str]) -> None:
    """Write the HTML page, and its figures beside it as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html_page(card, title=title, facts=facts), encoding="utf-8")
    path.with_suffix(".png").write_bytes(draw_figures(card))


def _sections(card: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    calibration, bias, stable = card["calibration"], card["length_bias"], card["stability"]
    temperature = calibration["temperature"]
    sections = [
        (
            "Accuracy",
            [
                ("all pairs", format_share(card["accuracy"])),
                ("log loss", f"{card['log_loss']:.4f} nats (a coin: 0.6931)"),
            ],
        ),
        ("By source", _shares(card["by_source"])),
        ("By length", _shares(card["by_length"])),
        (f"By {card['by_margin']['kind']} margin", _shares(card["by_margin"]["buckets"])),
        (
            "Calibration",
            [
                ("expected calibration error", f"{calibration['ece']:.4f}"),
                ("best temperature", f"{temperature:.3f} ({_confidence(temperature)})"),
            ],
        ),
        (
            "Length bias",
            [
                ("score per 10 extra tokens", f"{bias['slope_per_10_tokens']:+.4f} std"),
                ("pairs of equal length (within 10 %)", format_share(bias["accuracy_balanced"])),
                ("chosen is longer", format_share(bias["accuracy_chosen_longer"])),
                ("chosen is shorter", format_share(bias["accuracy_chosen_shorter"])),
                ("rule 'longer is better'", format_share(bias["accuracy_of_longer_is_better"])),
            ],
        ),
        ("Stability of raw scores", [(name, _change(stable[key])) for key, name in _STABILITY.items()]),
    ]
    sections[1:1] = _top_1_sections(card["top_1"]) if "top_1" in card else []
    return sections + _optional_sections(card)


def _optional_sections(card: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    sections = []
    if "agreement" in card:
        sections.append(("Agreement with other scorers", _agreement_rows(card["agreement"])))
    if "ensemble" in card:
        sections.append(("Ensemble", _ensemble_rows(card["ensemble"])))
    if "best_of_n" in card:
        rows = [(f"best of {row['n']}", f"judge {row['judge']:+.4f} (KL {row['kl']:.2f})") for row in card["best_of_n"]]
        sections.append(("Best of N by the judge", rows))
    if card.get("training"):
        sections.append(("Training", _training_rows(card["training"])))
    return sections


_STABILITY = {
    "batch_composition": "alone or in a batch (largest change)",
    "padding_side": "padded left or right (largest change)",
    "eos": "without the end-of-text token (mean change)",
}


def _ensemble_rows(ensemble: Mapping[str, Any]) -> list[tuple[str, str]]:
    members = {f"member {index}": member for index, member in enumerate(ensemble["members"])}
    return [
        *_shares(members),
        ("two members agree on a pair", f"{ensemble['pairwise_agreement']:.1%}"),
        ("spread of a score over members", f"{ensemble['score_std']:.3f} std"),
    ]


def _top_1_sections(top_1: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    rows = [(name, f"{format_share(row)} (chance: {row['chance']:.1%})") for name, row in top_1["subsets"].items()]
    ties = top_1.get("ties")
    if ties:
        rows.append(("Ties score", f"{ties['score']:.1%}, n = {ties['count']}"))
    rows += [("mean of subsets", f"{top_1['mean']:.1%}"), ("weighted by prompts", f"{top_1['weighted_mean']:.1%}")]
    sections = [("Top-1 of K (as RewardBench 2)", rows)]
    if ties:
        sections.append(("Parts of the Ties score", [(name, f"{ties[part]:.1%}") for part, name in _TIES.items()]))
    return sections


_TIES = {
    "tied_accuracy": "tied prompts: all correct above all incorrect",
    "ref_accuracy": "reference prompts: the correct one above all",
    "correctness_preferred": "margin to incorrect above spread among correct",
    "correctness_preferred_hard": "the same with the reference prompt's margin",
    "correctness_margin": "saturated ratio of margin to spread",
}


def _agreement_rows(agreement: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(f"accuracy of {name}", format_share(row)) for name, row in agreement["accuracy"].items()]
    return rows + [
        (" and ".join(row["models"]), f"{row['pairwise']:.1%} of pairs alike, Kendall's tau {row['kendall_tau']:+.3f}")
        for row in agreement["pairs"]
    ]


def _training_rows(training: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for index, run in enumerate(training):
        member = f"member {index}: " if len(training) > 1 else ""
        for name, label in (("loss", "loss"), ("accuracy", "held-out accuracy")):
            if values := run[name]["value"]:
                text = f"{values[0]:.4f} → {values[-1]:.4f} at step {run[name]['step'][-1]:.0f}"
                rows.append((f"{member}{label}, first → last", text))
    return rows


def _confidence(temperature: float) -> str:
    if not math.isfinite(temperature):
        return "worse than a coin"
    return "too timid" if temperature < 0.95 else "too sure" if temperature > 1.05 else "well scaled"


def _change(value: float | None) -> str:
    return "does not apply" if value is None else f"{value:.2e}"


def _html_section(title: str, rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<h2>{html.escape(title)}</h2><table>{body}</table>"


def _draw_reliability(axis: Any, bins: Sequence[Sequence[float]]) -> None:
    axis.plot([0.5, 1], [0.5, 1], color="#9aa5b1", linestyle="--", linewidth=1, label="perfect")
    axis.plot([row[0] for row in bins], [row[1] for row in bins], "o-", color="#1f6feb", label="model")
    axis.set(title="Reliability", xlabel="confidence", ylabel="accuracy", xlim=(0.5, 1.0))
    axis.legend(frameon=False)


def _draw_histogram(axis: Any, scores: Mapping[str, Sequence[float]]) -> None:
    options = {"bins": 40, "alpha": 0.6, "density": True}
    axis.hist(scores["chosen"], color="#2da44e", label="chosen", **options)
    axis.hist(scores["rejected"], color="#cf222e", label="rejected", **options)
    axis.set(title="Scores (normalized)", xlabel="score", ylabel="density")
    axis.legend(frameon=False)


def _draw_lengths(axis: Any, buckets: Mapping[str, Mapping[str, float]]) -> None:
    rows = [row for row in buckets.values() if row["count"]]
    positions = range(len(rows))
    low = [max(0.0, row["value"] - row["low"]) for row in rows]
    high = [max(0.0, row["high"] - row["value"]) for row in rows]
    axis.errorbar(positions, [row["value"] for row in rows], yerr=[low, high], fmt="o", capsize=4, color="#1f6feb")
    names = [name.removesuffix(" tokens") for name, row in buckets.items() if row["count"]]
    axis.set_xticks(list(positions), names, fontsize=8)
    axis.set(title="Accuracy by length", xlabel="tokens", ylabel="accuracy")


def _draw_best_of_n(axis: Any, curve: Sequence[Mapping[str, float]]) -> None:
    axis.plot([row["n"] for row in curve], [row["judge"] for row in curve], "o-", color="#8250df")
    axis.set_xscale("log", base=2)
    axis.set(title="Best of N", xlabel="N", ylabel="judge's mean score")


def _draw_training(axis: Any, training: Sequence[Mapping[str, Any]]) -> None:
    for index, run in enumerate(training):
        axis.plot(run["loss"]["step"], run["loss"]["value"], color="#1f6feb", label="loss" if index == 0 else None)
        if run["accuracy"]["value"]:
            label = "held-out accuracy" if index == 0 else None
            axis.plot(run["accuracy"]["step"], run["accuracy"]["value"], "o-", color="#2da44e", label=label)
    axis.set(title="Training", xlabel="step")
    axis.legend(frameon=False)
