"""One PPO iteration (generate, step) against TRL 0.11.4 and against our plain path: cost, and equality of results.

    tests/benchmarks/classic_environment.sh ~/trl-0.11.4          # once
    OMP_NUM_THREADS=1 python -m tests.benchmarks.ppo --classic ~/trl-0.11.4/bin/python

Every side runs in a process of its own and takes its turn; what is compared is CPU time within a round. All start each
round from the same weights with the same responses, whose lengths are forced alike, and must end it with the same
statistics, log-probabilities and parameters: otherwise nothing is reported. `--bf16` adds a side. Rounds are appended
to `--output` as they come; an interrupted run goes on where it stopped. `python -m tests.benchmarks.table` writes the
table.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.decode_loop import DecodeLoop
from tests.benchmarks.records import ROOT, add_rounds
from tests.benchmarks.workloads import WORKLOADS, Task, Workload

TOLERANCES = {"statistics": 1e-4, "clipped": 1e-3, "logprobs": 1e-4, "change": 1e-2}
"""`clipped`: a fraction counts tokens beyond a threshold, so one that stands within rounding of it moves it by a whole
token: cpu-full passes over 16,384 tokens, and 4 of them are 2.4e-4. One token in a thousand may lie so close."""
AFTER_A_FLIP = {**TOLERANCES, "statistics": 1e-3}
"""Where a token stood so near to a clip threshold that rounding put it on the other side. Its gradient is then another
one, and Adam carries that into all later minibatches."""
TOLERANCES_BF16 = {"statistics": 5e-2, "clipped": 5e-2, "logprobs": 5e-2, "change": 0.5}
"""8 bits of mantissa; Adam's first steps go by the sign of a gradient, which small ones lose."""


class Process:
    """A side in its own process."""

    def __init__(self, side: str, python: str, folder: Path, options: dict[str, Any], module: str = "sides") -> None:
        self.name = side
        self.process = subprocess.Popen(
            [python, "-m", f"tests.benchmarks.{module}", side, str(folder), json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )  # fmt: skip
        self.resident = self._answer()["resident_mib"]

    def __call__(self, command: str, *arguments: Any) -> dict[str, float]:
        assert self.process.stdin is not None
        print(json.dumps([command, *arguments]), file=self.process.stdin, flush=True)
        return self._answer()

    def iteration(self) -> dict[str, Any]:
        """What one PPO iteration costs, weights and optimizer fresh; memory above that of the loaded models."""
        self("reset")
        phases = {"generate": self("generate"), "step": self("step")}
        for cost in phases.values():
            cost["peak_mib"] -= self.resident
        return phases

    def results(self, folder: Path) -> dict[str, Any]:
        """What the last step computed."""
        path = folder / f"{self.name}.pt"
        self("save", str(path))
        results: dict[str, Any] = torch.load(path)
        return results

    def stop(self) -> None:
        """End the process."""
        self.process.communicate()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the side {self.name!r} ended with {self.process.wait()}: its message stands above")
        answer: dict[str, float] = json.loads(line)
        return answer


def prepare(workload: Workload, folder: Path) -> Task:
    """Write the model, and sample the responses that every side learns from."""
    model = workload.model()
    model.save_pretrained(folder)
    samples = DecodeLoop()(
        model, workload.prompts(), SamplingConfig(max_new_tokens=workload.cap),
        generator=torch.Generator().manual_seed(3), limits=workload.lengths(),
    )  # fmt: skip
    value_head = AutoModelForCausalLMWithValueHead.from_pretrained(model).v_head.state_dict()
    return Task.write(workload, folder, samples.responses, value_head)


def gaps_of(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """How far the statistics that both sides have are apart, relative above 1."""
    mine, theirs = one["statistics"], other["statistics"]
    shared = {name for name in mine.keys() & theirs.keys() if not name.startswith(("time/", "work/"))}
    return {name: abs(mine[name] - theirs[name]) / max(1.0, abs(theirs[name])) for name in shared}


def differences(one: dict[str, Any], other: dict[str, Any], start: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far two steps from the same `start` are apart.

    Returns:
        `statistics`: the largest difference, relative above 1, of all but the fractions of clipped tokens, whose
        largest is `clipped`. `logprobs`: the largest, nats. `change`: the norm of the difference of the two parameter
        changes over the norm of one.
    """
    gaps = gaps_of(one, other)
    fractions = {name for name in gaps if name.endswith("clipfrac")}
    apart = far = 0.0
    for name, value in one["parameters"].items():
        apart += float((value - other["parameters"][name]).double().square().sum())
        if name in start:
            far += float((value - start[name]).double().square().sum())
    return {
        "statistics": max(gaps[name] for name in gaps.keys() - fractions),
        "clipped": max((gaps[name] for name in fractions), default=0.0),
        "logprobs": float((one["logprobs"] - other["logprobs"]).abs().max()),
        "change": (apart / far) ** 0.5,
    }


def check_equal(sides: list[Process], folder: Path) -> dict[str, dict[str, float]]:
    """The first side's differences to each other one.

    Raises:
        RuntimeError: One is beyond its tolerance.
    """
    from safetensors.torch import load_file

    start = {f"pretrained_model.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    ours, *others = [(side.name, side.results(folder)) for side in sides]
    found = {}
    for name, results in others:
        found[name] = differences(ours[1], results, start)
        exact = AFTER_A_FLIP if found[name]["clipped"] > 1e-6 else TOLERANCES
        tolerances = TOLERANCES_BF16 if name == "bf16" else exact
        if wrong := {what: gap for what, gap in found[name].items() if not gap <= tolerances[what]}:
            largest = sorted(gaps_of(ours[1], results).items(), key=lambda gap: -gap[1])[:3]
            raise RuntimeError(
                f"ours and {name} must give equal results, differing by at most {tolerances}, got {wrong} (statistics: "
                f"{largest}): a speed without equal results says nothing."
            )
    return found


def costs_of(sides: list[Process], number: int, rows: int) -> dict[str, Any]:
    """Every side once, in changing order; then what bounds ours, and TRL's generation of all `rows` in one batch."""
    turns = sides if number % 2 == 0 else sides[::-1]
    costs = {side.name: side.iteration() for side in turns}
    for side in sides:
        if side.name in ("ours", "bf16"):
            costs[side.name] |= {"floor": side("floor"), "work": side("work")}
        elif side.name == "classic" and number == 0:
            costs["classic"]["generate_at_once"] = side("generate", rows)
    return costs


def measure(workload: Workload, options: argparse.Namespace) -> None:
    """Add rounds of one workload to the output."""
    pythons = {"ours": sys.executable, "bf16": options.bf16 and sys.executable, "classic": options.classic}
    if options.plain_rounds:
        pythons["plain"] = sys.executable
    settings = {"ours": json.loads(options.ours)}
    low = settings["ours"] | {"bf16": True}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(workload, folder)
        options_of = settings | {"bf16": low}
        sides = [Process(side, python, folder, options_of.get(side, {})) for side, python in pythons.items() if python]

        for side in sides:
            if side.name in options_of:
                side("prove")

        def one_round(number: int) -> dict[str, Any]:
            present = [side for side in sides if side.name != "plain" or number < options.plain_rounds]
            costs = costs_of(present, number, workload.rows)
            return costs | {"equal": check_equal(present, folder)}

        add_rounds(options.output, workload, one_round, rounds=options.rounds, **settings)
        for side in sides:
            side.stop()


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classic", help="Python of an environment with TRL 0.11.4; none: only our own two paths")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["cpu-skew", "cpu-full", "cpu-vocab"])
    parser.add_argument("--rows", type=int, help="responses of an iteration, instead of the workload's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain-rounds", type=int, default=2, help="rounds that the plain path takes part in")
    parser.add_argument("--ours", default="{}", help="further settings of our PPOConfig, JSON")
    parser.add_argument("--bf16", action="store_true", help="also ours with products in bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("docs/results/performance.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.workloads:
        measure(replace(WORKLOADS[name], rows=options.rows or WORKLOADS[name].rows), options)


if __name__ == "__main__":
    main()
