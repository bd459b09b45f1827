"""Measured rounds on disk: appended one by one, so that an interrupted run goes on where it stopped."""

import json
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.workloads import Workload

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "accelerate")


def add_rounds(
    path: Path, workload: Workload, one_round: Callable[[int], dict[str, Any]], *, rounds: int, **settings: Any
) -> None:
    """Measure until `path` holds so many rounds of this workload.

    Args:
        path: JSON; other workloads in it stay.
        workload: What is measured; its name is the key.
        one_round: From a round's number to what it cost.
        rounds: How many there shall be.
        settings: Further facts that a figure depends on.

    Raises:
        ValueError: The file holds rounds of this workload under other conditions.
    """
    known = {**conditions(workload), **settings}
    while True:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        entry = found.setdefault(workload.name, known | {"rounds": []})
        if changed := [name for name in _FIXED | settings.keys() if entry.get(name) != known[name]]:
            raise ValueError(
                f"{path} holds rounds of {workload.name!r} with another {', '.join(sorted(changed))}: rounds of two "
                "things make no ratio. Remove that entry, or choose another output."
            )
        if len(entry["rounds"]) >= rounds:
            return
        entry["rounds"].append(one_round(len(entry["rounds"])))
        aside = path.with_suffix(".part")
        aside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        aside.replace(path)


def conditions(workload: Workload) -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "workload": asdict(workload), "response_tokens": sum(workload.lengths()),
        "tokens": sum(workload.lengths()) + workload.rows * workload.prompt, "threads": torch.get_num_threads(),
        "commit": revision("HEAD"), "sources": revision("HEAD:rlhf_ppo"), "machine": processor(),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
    }  # fmt: skip


def processor() -> str:
    """Its name, and the instructions that decide how fast it multiplies."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    extensions = [name for name in ("avx512f", "avx512_bf16", "amx_bf16") if name in found.get("flags", "").split()]
    return f"{found.get('model name', platform.machine())} ({', '.join(extensions) or 'no AVX-512'})"


def revision(name: str) -> str:
    """The hash of a commit, or of a folder in one."""
    command = ["git", "rev-parse", name]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()


_FIXED = {"workload", "threads", "sources", "machine", "versions"}
