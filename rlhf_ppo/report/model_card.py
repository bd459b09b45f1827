"""README.md of a run folder: a model card with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rlhf_ppo.report.run_data import RunData
from rlhf_ppo.report.settings import base_model, is_hub_name, setting_rows
from rlhf_ppo.report.summary import evaluation_rows, findings, headline
from rlhf_ppo.report.templates import render


def model_card(data: RunData, *, title: str, plots: Sequence[tuple[str, str]] = ()) -> str:
    """The card as Markdown with a YAML header; `plots` are (title, path within the folder)."""
    origin = base_model(data.config)
    return render(
        "model_card.md.j2",
        header=_header(origin),
        title=" ".join(title.split()),
        headline=headline(data),
        plots=plots,
        base_model=origin,
        folder=f"{data.name}/{data.model_folder or 'model'}",
        has_model=bool(data.model_folder),
        evaluation=evaluation_rows(data),
        findings=findings(data),
        settings=setting_rows(data.config),
        sample_count=len(data.samples),
    )


def _header(origin: str) -> str:
    """YAML; a JSON string is a YAML string, so nothing in a name can break out of it."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if is_hub_name(origin):
        lines.append(f"base_model: {json.dumps(origin)}")
    lines += ["tags:", *(f"- {tag}" for tag in ("reinforcement-learning", "rlhf", "ppo", "rlhf_ppo"))]
    return "\n".join(lines)
