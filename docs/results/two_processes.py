"""The sentiment recipe on two processes: one of them killed half-way, resumed, judged. Writes JSON and a table.

    python docs/results/two_processes.py runs/two_processes [--iterations 40] [--kill-after 12]

The run folder must be new. Together the two processes learn from as many responses as one process does by default.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from collect import MEASURES, collect

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATIENCE = 60.0
"""Seconds within which all processes must have ended after one was killed."""


def command(folder: Path, iterations: int) -> list[str]:
    """What the user types, as far as its options go."""
    launch_file, recipe = ROOT / "recipes/launch/cpu_2.yaml", ROOT / "recipes/ppo_gpt2_sentiment.py"
    options = {
        "output-dir": folder, "batch-size": 64, "mini-batch-size": 16, "iterations": iterations, "save-every": 5,
        "threads": 1,
    }  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0")
    return [*launcher, "--config_file", str(launch_file), str(recipe), *arguments]


def environment() -> dict[str, str]:
    """Two threads in all."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "recipes")))
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def process_of_rank(launcher: int, rank: int) -> int:
    """The process id that the launcher gave this rank."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return int(child)
    raise RuntimeError(f"the launcher {launcher} has no child of rank {rank}")


def killed(folder: Path, iterations: int, kill_after: int) -> dict[str, Any]:
    """Start, kill rank 1 after so many iterations, and say how the others ended."""
    log, metrics = folder.parent / f"{folder.name}-killed.log", folder / "metrics.jsonl"
    with log.open("w") as output:
        launcher = subprocess.Popen(
            command(folder, iterations), env=environment(), stdout=output, stderr=subprocess.STDOUT, cwd=ROOT
        )
        while not metrics.exists() or len(metrics.read_text().splitlines()) < kill_after:
            if launcher.poll() is not None:
                raise RuntimeError(f"the run ended by itself: see {log}")
            time.sleep(0.5)
        victim = process_of_rank(launcher.pid, 1)
        start = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        status = launcher.wait(timeout=PATIENCE)
        seconds = time.monotonic() - start
    said = log.read_text()
    return {
        "killed_after_iteration": len(metrics.read_text().splitlines()), "seconds_to_the_end": seconds,
        "status": status, "names_the_signal": "Signal 9 (SIGKILL)" in said, "names_the_rank": "rank      : 1" in said,
    }  # fmt: skip


def resumed(folder: Path, iterations: int) -> dict[str, Any]:
    """The same command again, to its end."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))[-1]
    with (folder.parent / f"{folder.name}-resumed.log").open("w") as output:
        subprocess.run(
            command(folder, iterations), env=environment(), stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
            check=True,
        )  # fmt: skip
    rows = [json.loads(line)["iteration"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"resumed_from": found.name, "every_iteration_once": rows == list(range(1, iterations + 1))}


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    kill, resume = found["kill"], found["resume"]
    run = found["runs"][0]["evaluation"]
    lines = [
        "# The main job on two processes", "", f"`{found['command']}`", "",
        (f"This run tests what a killed process does. Process 1 was killed (SIGKILL) after iteration "
        f"{kill['killed_after_iteration']}. All processes had ended {kill['seconds_to_the_end']:.1f} s later, and the "
        "output named signal and rank. The same command then continued "
        f"from {resume['resumed_from']} to iteration {run_length(found)}."), "",
        "The table shows means over held-out prompts, ± standard error:", "",
        "| measure | before | after |", "|---|---|---|",
    ]  # fmt: skip
    for name in MEASURES:
        if name in run["before"]:
            before, after = run["before"][name], run["after"][name]
            lines.append(f"| {name} | {before['mean']:.3g} | **{after['mean']:.3g}** ± {after['stderr']:.2g} |")
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return "\n".join([*lines, "", f"Commit {found['commit'][:12]}; {found['machine']}; {versions}.", ""])


def run_length(found: dict[str, Any]) -> int:
    """Iterations in all."""
    return int(found["runs"][0]["config"]["iterations"])


def main() -> None:
    """Kill, resume, collect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--kill-after", type=int, default=12)
    options = parser.parse_args()
    folder = options.folder.absolute()
    if folder.exists():
        raise SystemExit(f"{folder} exists: give a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    kill = killed(folder, options.iterations, options.kill_after)
    resume = resumed(folder, options.iterations)
    said = (
        "ACCELERATE_USE_CPU=true accelerate launch --config_file recipes/launch/cpu_2.yaml "
        "recipes/ppo_gpt2_sentiment.py --batch-size 64 --mini-batch-size 16 --save-every 5 "
        f"--iterations {options.iterations} --threads 1"
    )
    found = collect([folder], said, "HEAD") | {"kill": kill, "resume": resume}
    (HERE / "two-processes.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "two-processes.md").write_text(table(found))


if __name__ == "__main__":
    main()
