"""The page of the fuzzing campaign: `python -m tests.fuzz.report` writes docs/results/fuzzing.md from fuzzing.json."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "docs" / "results"
WHAT = {
    "step": "`PPOTrainer.step`: batches with parts replaced by other types, shapes, values",
    "config": "every configuration, contracts of reward models, files of run folders",
    "dataset": "`PromptDataset`, preference rows, files of both",
    "checkpoint": "`restore_checkpoint`: folders that were cut, flipped, swapped, rewritten, checksums fitting or not",
}
DID = {
    "begun anew": "began anew", "the newest": "continued from the newest checkpoint",
    "the one before": "continued from the one before",
}  # fmt: skip


def page(found: dict[str, Any]) -> str:
    """Markdown."""
    about = found["about"]
    total = sum(found[name].get("cases", 0) for name in WHAT)
    lines = [
        "# Fuzzing", "", "`python -m tests.fuzz.campaign --cases 30000 [--target ...]`", "",
        f"The campaign has called the library with {total:,} random inputs so far. An input must be accepted, or be",
        "refused with an error of the library, and a refusal must leave every parameter and optimizer state as it was.",
        "Anything else is a finding: another exception, an error message of Python itself, a change, or a call of more",
        "than a minute. The same command continues the campaign.", "",
        "| Entry point | Cases | Refused | Accepted | Findings | Longest, ms of CPU |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, what in WHAT.items():
        row = found[name]
        findings = sum(row.get("findings", {}).values())
        numbers = [row.get(key, 0) for key in ("cases", "refused", "accepted")]
        cells = [what, *(f"{number:,}" for number in numbers), str(findings), f"{row.get('longest_ms', 0.0):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    outcomes = found["checkpoint"].get("outcomes", {})
    if outcomes:
        named = ", ".join(f"{count:,} {DID.get(name, name)}" for name, count in sorted(outcomes.items()))
        lines += [
            "", f"In the last row, each folder has two checkpoints. Of the accepted cases, {named}.",
            "A run begins anew only if every folder has lost both its manifest and its state.",
        ]  # fmt: skip
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return "\n".join([*lines, "", f"Commit {about['commit']}; {versions}.", ""])


if __name__ == "__main__":
    content = json.loads((RESULTS / "fuzzing.json").read_text())
    (RESULTS / "fuzzing.md").write_text(page(content), encoding="utf-8")
