"""README.md of a run folder: a model card with the metadata that the Hugging Face hub reads."""

import json
from collections.abc import Sequence

from rlhf_ppo.report.run_data import RunData
from rlhf_ppo.report.settings import base_model, is_hub_name, setting_rows
from rlhf_ppo.report.summary import evaluation_rows, findings, headline
from rlhf_ppo.report.templates import render


def model_card(data: RunData, *, title: str, plots: Sequence[tuple[str, str]] = ()) -> str:
    """Render the card as Markdown with a YAML header; `plots` are (title, path within the folder)."""
    base = base_model(data.config)
    return render(
        "model_card.md.j2",
        header=_header(base),
        title=" ".join(title.split()),
        headline=headline(data),
        plots=plots,
        base_model=base,
        folder=f"{data.name}/{data.model_folder or 'model'}",
        has_model=bool(data.model_folder),
        evaluation=evaluation_rows(data),
        findings=findings(data),
        settings=setting_rows(data.config),
        sample_count=len(data.samples),
    )


def _header(base: str) -> str:
    """Render the YAML header; names are quoted as JSON strings, which are valid YAML."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if is_hub_name(base):
        lines.append(f"base_model: {json.dumps(base)}")
    lines += ["tags:", *(f"- {tag}" for tag in ("reinforcement-learning", "rlhf", "ppo", "rlhf_ppo"))]
    return "\n".join(lines)
