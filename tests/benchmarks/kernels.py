"""What each fast path earns: one PPO iteration of ours with everything on, and with one path switched off by itself.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.kernels

Every variant runs in a process of its own, some at a time, in changing order within a round. All start each round from
the same weights with the same responses, and a variant must give equal results. Rounds are appended to `--output` as
they come, and an interrupted run goes on where it stopped. `tests.benchmarks.switches` lists the paths. An update is
one epoch, whose CPU time counts as often as the workload has epochs.
"""

import argparse
import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import pairs
from tests.benchmarks.ppo import AFTER_A_FLIP, TOLERANCES, TOLERANCES_BF16, differences, prepare
from tests.benchmarks.records import conditions
from tests.benchmarks.switches import USUAL, WORK, Switch, answer, on
from tests.benchmarks.workloads import Workload


class Variant:
    """Our side with one fast path off, or with none (None), in a process of its own."""

    def __init__(self, context: Any, folder: Path, workload: str, name: str | None) -> None:
        self.name, self.epochs = name, WORK[workload][0].epochs
        self.phases = ("epoch",) if workload == "rm-pairs" else ("generate", "step")
        if name is not None:
            self.phases = on(workload)[name].phases
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=answer, args=(theirs, str(folder), workload, name))
        self.process.start()
        theirs.close()
        self.resident = self.connection.recv()["resident_mib"]
        if workload != "rm-pairs":
            self("prove")

    def __call__(self, command: str, *arguments: Any) -> Any:
        self.connection.send([command, *arguments])
        return self.connection.recv()

    def costs(self) -> dict[str, dict[str, float]]:
        """Of each phase: CPU seconds, and memory above that of the loaded models."""
        if self.phases != ("epoch",):
            self("reset")
        found = {phase: self(phase) for phase in self.phases}
        if "step" in found:
            found["step"]["cpu"] += (self.epochs - 1) * found["step"]["update"]
        return {
            phase: {"cpu": cost["cpu"], "peak_mib": cost["peak_mib"] - self.resident, "loss": cost.get("loss", 0.0)}
            for phase, cost in found.items()
        }

    def results(self, folder: Path) -> Any:
        """What the last step computed."""
        self("save", str(path := folder / "results.pt"))
        return torch.load(path)

    def stop(self) -> None:
        """End the process."""
        self.connection.send(None)
        self.process.join()


def check_equal(base: Variant, others: list[Variant], folder: Path, workload: str) -> dict[str, dict[str, float]]:
    """How far each variant's step is from that with everything on.

    Raises:
        RuntimeError: One is beyond its tolerance.
    """
    from safetensors.torch import load_file

    start = {f"pretrained_model.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    ours, found = base.results(folder), {}
    for variant in others:
        assert variant.name is not None
        found[variant.name] = gaps = differences(ours, variant.results(folder), start)
        exact = AFTER_A_FLIP if gaps["clipped"] > 1e-6 else TOLERANCES
        limits = TOLERANCES_BF16 if workload == "cpu-bf16" else exact
        if any(not gap <= limits[what] for what, gap in gaps.items()):
            raise RuntimeError(f"{variant.name} off must give equal results, within {limits}, got {gaps}")
    return found


def total(costs: dict[str, dict[str, float]], base: dict[str, dict[str, float]]) -> dict[str, float]:
    """Of one iteration; phases that were not run are those of `base`."""
    phases = [costs.get(phase, cost) for phase, cost in base.items()]
    return {"cpu": sum(cost["cpu"] for cost in phases), "peak_mib": max(cost["peak_mib"] for cost in phases)}


def measure(name: str, chosen: dict[str, Switch], options: argparse.Namespace) -> None:
    """Add rounds of some fast paths on one workload."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "rlhf_ppo", "tests.benchmarks.pair_sides"])
    workload: Workload = WORK[name][0]
    known = conditions(workload)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (pairs.prepare if name == "rm-pairs" else prepare)(workload, folder)
        for first in range(0, len(chosen), options.group):
            group = list(chosen)[first : first + options.group]
            missing = [path for path in group if len(_paths(options.output, name, path)) < options.rounds]
            if not missing:
                continue
            variants = [Variant(context, folder, name, path) for path in (None, *missing)]
            for _ in range(options.rounds):
                one_round(variants, folder, name, known, options)
            for variant in variants:
                variant.stop()


def one_round(
    variants: list[Variant], folder: Path, name: str, known: dict[str, Any], options: argparse.Namespace
) -> None:
    """Run each variant that lacks a round once, and write down what it cost."""
    base, *others = variants
    done = {variant.name: len(_paths(options.output, name, str(variant.name))) for variant in others}
    missing = [variant for variant in others if done[variant.name] < options.rounds]
    if not missing:
        return
    turn = min(done[variant.name] for variant in missing) % (len(missing) + 1)
    order = [base, *missing]
    costs = {variant.name: variant.costs() for variant in order[turn:] + order[:turn]}
    equal = {}
    if name != "rm-pairs":
        compared = [v for v in missing if done[v.name] == 0 and "step" in v.phases and on(name)[str(v.name)].equal]
        equal = check_equal(base, compared, folder, name)
    elif len({round(cost["epoch"]["loss"], 5) for cost in costs.values()}) > 1:
        raise RuntimeError(f"all variants must have the same mean loss over the epoch, got {costs}")
    found = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else {}
    for variant in missing:
        path = str(variant.name)
        switch = on(name)[path]
        entry = found.setdefault(name, known | {"paths": {}})["paths"].setdefault(
            path, {"module": switch.module, "twin": switch.twin, "rounds": []}
        )
        both = {"on": costs[None], "off": costs[variant.name]}
        entry["rounds"].append({side: total(cost, costs[None]) for side, cost in both.items()})
        entry |= {"equal": equal[path]} if path in equal else {}
        pair = entry["rounds"][-1]
        ratios = {what: round(pair["off"][what] / pair["on"][what], 3) for what in ("cpu", "peak_mib")}
        print(name, path, len(entry["rounds"]), ratios, pair, flush=True)
    aside = options.output.with_suffix(".part")
    aside.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    aside.replace(options.output)


def _paths(output: Path, workload: str, path: str) -> list[Any]:
    """The rounds that a file holds."""
    found = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    rounds: list[Any] = found.get(workload, {}).get("paths", {}).get(path, {}).get("rounds", [])
    return rounds


def main() -> None:
    """Run what the command line asks for and the file does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORK, default=[*USUAL, "cpu-gpt2", "cpu-bf16", "rm-pairs"])
    parser.add_argument("--only", nargs="+", help="these fast paths alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--group", type=int, default=5, help="variants beside the one with everything on, at a time")
    parser.add_argument("--output", type=Path, default=Path("docs/results/kernels.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.workloads:
        chosen = {path: switch for path, switch in on(name).items() if not options.only or path in options.only}
        if chosen:
            measure(name, chosen, options)


if __name__ == "__main__":
    main()
