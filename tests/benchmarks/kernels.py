"""What each fast path earns: our PPO iteration with everything on, and with one path switched off by itself.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.kernels

Peak memory, and the CPU time of what is no part of an update, come from iterations (generation, scoring, one epoch that
counts as often as the workload has epochs) in a process for each variant. They take turns in changing order, and all
must give equal results. The CPU time of an update comes from optimizer steps with and without the path on the same
rows, one right behind the other in one process: a shared processor changes its pace within seconds. Rounds are
appended to `--output` as they come, and an interrupted run goes on where it stopped. `tests.benchmarks.switches` lists
the paths.
"""

import argparse
import gc
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import pair_sides, pairs
from tests.benchmarks.ppo import AFTER_A_FLIP, TOLERANCES, TOLERANCES_BF16, differences, prepare
from tests.benchmarks.records import conditions
from tests.benchmarks.sides import Ours, cost, count_cpu_seconds, memory
from tests.benchmarks.switches import SWITCHES, WORK, Switch, switches_on
from tests.benchmarks.workloads import Task


class Paired(Ours):
    """Our side, with optimizer steps that take turns."""

    def pairs(self, name: str) -> dict[str, Any]:
        """CPU seconds of each optimizer step of an epoch, [with, without] the fast path; both move the weights."""
        if not self.trainer.optimizer.state:  # the first step makes Adam's moments
            self.learn()
        self.reshuffle()
        update: Any = self.trainer.algorithm.update
        step, found = update._step, []

        def both(batch: Any, rows: Any, record: Any) -> None:
            seconds = {}
            for off in (False, True) if len(found) % 2 == 0 else (True, False):
                with SWITCHES[name].off() if off else ExitStack():
                    start = time.process_time()
                    step(batch, rows, record)
                    seconds[off] = time.process_time() - start
            found.append([seconds[False], seconds[True]])

        update._step = both
        try:
            self.learn()
        finally:
            update._step = step
        return {"pairs": found}


class Variant:
    """Our side with one fast path off, or with none (None), in a process of its own."""

    def __init__(self, context: Any, folder: Path, workload: str, name: str | None) -> None:
        self.name, self.is_ppo = name, workload != "rm-pairs"
        self.times = WORK[workload][0].epochs // WORK[workload][1].get("ppo_epochs", 1)
        everything = ("generate", "step") if self.is_ppo else ("epoch",)
        self.phases = everything if name is None else SWITCHES[name].phases
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=answer, args=(theirs, str(folder), workload, name))
        self.process.start()
        theirs.close()
        self.resident = self.connection.recv()["resident_mib"]
        if self.is_ppo:
            self("prove")

    def __call__(self, command: str, *arguments: Any) -> Any:
        self.connection.send([command, *arguments])
        return self.connection.recv()

    def costs(self) -> dict[str, dict[str, float]]:
        """Of each phase: CPU seconds, and memory above that of the loaded models."""
        if self.is_ppo:
            self("reset")
        found = {phase: self(phase) for phase in self.phases}
        for spent in found.values():
            spent["peak_mib"] -= self.resident
        if "step" in found:
            found["step"]["cpu"] += (self.times - 1) * found["step"]["update"]
        return found

    def results(self, folder: Path) -> Any:
        """What the last step computed."""
        self("save", str(path := folder / "results.pt"))
        return torch.load(path)

    def stop(self) -> None:
        """End the process."""
        self.connection.send(None)
        self.process.join()


def answer(connection: Any, folder: str, workload: str, name: str | None) -> None:
    """Run commands of `connection` on our side of `workload` in this process, with one fast path off."""
    torch.set_num_threads(1)
    count_cpu_seconds("ours")
    options = {"ppo_epochs": 1} | WORK[workload][1] | ({} if name is None else SWITCHES[name].settings)
    kinds: dict[bool, Callable[..., Any]] = {
        True: lambda: pair_sides.Ours(Path(folder), options), False: lambda: Paired(Task.read(Path(folder)), options),
    }  # fmt: skip
    with ExitStack() as stack:
        if name is not None:
            stack.enter_context(SWITCHES[name].off())
        side = kinds[workload == "rm-pairs"]()
        gc.collect()
        connection.send({"resident_mib": memory("VmRSS")})
        for command, *arguments in iter(connection.recv, None):
            connection.send(cost(getattr(side, command), *arguments))


def check_equal(base: Variant, other: Variant, folder: Path, workload: str) -> dict[str, float]:
    """How far a variant's step is from that with everything on.

    Raises:
        RuntimeError: It is beyond its tolerance.
    """
    from safetensors.torch import load_file

    start = {f"pretrained_model.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    gaps = differences(base.results(folder), other.results(folder), start)
    exact = AFTER_A_FLIP if gaps["clipped"] > 1e-6 else TOLERANCES
    limits = TOLERANCES_BF16 if workload == "cpu-bf16" else exact
    if any(not gap <= limits[what] for what, gap in gaps.items()):
        raise RuntimeError(f"{other.name} off must give equal results, within {limits}, got {gaps}")
    return gaps


class Results:
    """The file of all rounds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def of(self, workload: str, name: str) -> dict[str, Any]:
        """The entry of a fast path, made where it is missing."""
        entry = self.found.setdefault(workload, conditions(WORK[workload][0]) | {"paths": {}})
        switch = SWITCHES[name]
        words = {"module": switch.module, "twin": switch.twin}
        path: dict[str, Any] = entry["paths"].setdefault(name, words | {"rounds": [], "pairs": []})
        return path

    def write(self) -> None:
        """Replace the file."""
        aside = self.path.with_suffix(".part")
        aside.write_text(json.dumps(self.found) + "\n", encoding="utf-8")
        aside.replace(self.path)


def total(costs: dict[str, dict[str, float]], base: dict[str, dict[str, float]]) -> dict[str, float]:
    """Of one iteration; phases that were not run are those of `base`."""
    phases = [costs.get(phase, cost) for phase, cost in base.items()]
    return {"cpu": sum(cost["cpu"] for cost in phases), "peak_mib": max(cost["peak_mib"] for cost in phases)}


def measure_iterations(
    results: Results, workload: str, folder: Path, start: Callable[..., Variant], names: list[str], rounds: int
) -> None:
    """Rounds of whole iterations of some variants and of that with everything on."""
    variants = [start(folder, workload, name) for name in (None, *names)]
    for number in range(rounds):
        turn = number % len(variants)
        costs = {variant.name: variant.costs() for variant in variants[turn:] + variants[:turn]}
        for variant in variants[1:]:
            assert variant.name is not None
            entry, off = results.of(workload, variant.name), costs[variant.name]
            entry["rounds"].append(
                {side: total(cost, costs[None]) for side, cost in (("on", costs[None]), ("off", off))}
            )
            if workload == "rm-pairs" and abs(off["epoch"]["loss"] - costs[None]["epoch"]["loss"]) > 1e-5:
                raise RuntimeError(f"all variants must have the same mean loss over the epoch, got {costs}")
            if "step" in variant.phases and "equal" not in entry and SWITCHES[variant.name].equal:
                entry["equal"] = check_equal(variants[0], variant, folder, workload)
            print(workload, variant.name, entry["rounds"][-1], flush=True)
        results.write()
    for variant in variants:
        variant.stop()


def measure(workload: str, chosen: dict[str, Switch], options: argparse.Namespace) -> None:
    """Add what is missing of some fast paths on one workload."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "rlhf_ppo", "tests.benchmarks.kernels"])
    start = partial(Variant, context)
    results = Results(options.output)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (pairs.prepare if workload == "rm-pairs" else prepare)(WORK[workload][0], folder)
        missing = [name for name in chosen if len(results.of(workload, name)["rounds"]) < options.rounds]
        for first in range(0, len(missing), options.group):
            group = missing[first : first + options.group]
            had = min(len(results.of(workload, name)["rounds"]) for name in group)
            measure_iterations(results, workload, folder, start, group, options.rounds - had)
        paired = [name for name, switch in chosen.items() if switch.paired and options.epochs]
        base = start(folder, workload, None) if paired else None
        for _ in range(options.epochs):
            for name in paired:
                entry = results.of(workload, name)
                if base is not None and len(entry["pairs"]) < options.epochs:
                    entry["pairs"].append(base("pairs", name)["pairs"])
                    print(workload, name, [sum(column) for column in zip(*entry["pairs"][-1], strict=True)], flush=True)
                    results.write()
        if base is not None:
            base.stop()


def main() -> None:
    """Run what the command line asks for and the file does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--only", nargs="+", help="these fast paths alone")
    parser.add_argument("--rounds", type=int, default=3, help="iterations in processes of their own")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of optimizer steps that take turns")
    parser.add_argument("--group", type=int, default=5, help="variants beside the one with everything on, at a time")
    parser.add_argument("--output", type=Path, default=Path("docs/results/kernels.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for workload in options.workloads:
        switches = switches_on(workload)
        if chosen := {name: switch for name, switch in switches.items() if not options.only or name in options.only}:
            measure(workload, chosen, options)


if __name__ == "__main__":
    main()
