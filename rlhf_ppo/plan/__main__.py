"""`python -m rlhf_ppo.plan`: memory of a run on each device, and its time at measured FLOP rates."""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ppo.plan.config import PlanConfig, PlanError, read_config
from rlhf_ppo.utils.flags import FlagParser, add_flags

if TYPE_CHECKING:
    from rlhf_ppo.plan.compute import FlopRates


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; exit status 2 for settings that cannot be planned."""
    options = vars(_parser().parse_args(arguments))
    config, gpus, rates, measure, print_json = (
        options.pop(name) for name in ("config", "gpus", "rates", "measure", "json")
    )
    import torch  # here, so that the help comes without it

    from rlhf_ppo.plan.compute import FlopRates, iteration_flops
    from rlhf_ppo.plan.fit import with_fitted_pass_size
    from rlhf_ppo.plan.memory import make_plan
    from rlhf_ppo.plan.tables import as_json, as_text
    from rlhf_ppo.plan.traces import frozen_model_bytes, trace_memory

    try:
        if measure:
            _measure_here(options, "cuda" if torch.cuda.is_available() else "cpu")
        plan = read_config(config, **options) if config else PlanConfig(**options)
        if measure and plan.precision == "nf4":
            raise PlanError("--measure does not run nf4: plan it, or measure bfloat16")
        rates = None if rates is None else _read_rates(rates)
        plan = with_fitted_pass_size(plan)
        traces = trace_memory(plan)
        reward = 0.0 if plan.reward_model is None else float(frozen_model_bytes(plan, plan.reward_model))
        plans = [make_plan(plan, traces, devices=count, reward_weights=reward) for count in gpus]
        measurement = _run_measurement(plan) if measure else None
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    if measurement is not None:
        rates = FlopRates(**measurement["rates"])
    flops = iteration_flops(plan, traces)
    if print_json:
        print(json.dumps(as_json(plans, flops, rates) | {"measured": measurement}, indent=1))  # noqa: T201
        return 0
    print(as_text(plans, flops, rates))  # noqa: T201
    if measurement is not None:
        planned = make_plan(plan, traces).peak
        print(  # noqa: T201
            f"measured here, one process: peak {measurement['peak'] / 2**30:.3f} GiB, planned {planned / 2**30:.3f} "
            f"({planned / measurement['peak'] - 1:+.1%})"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        "python -m rlhf_ppo.plan", __doc__,
        epilog="Memory is traced from the code itself, run on fake tensors. See docs/scaling.md.\nexamples:\n"
        "  rlhf-ppo plan --model 7b --strategy zero3 --gpus 1 8 64\n  rlhf-ppo plan --config plan.yaml --measure",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of these settings; options override it")
    add_flags(parser, PlanConfig, overriding=True)
    parser.add_argument("--gpus", type=_devices, nargs="+", default=[1], metavar="INT", help="Numbers of devices (1)")
    parser.add_argument("--rates", metavar="FILE", help="FLOP rates of an earlier `--measure --json`")
    parser.add_argument("--measure", action="store_true", help="Run one iteration on this machine and compare")
    parser.add_argument("--json", action="store_true", help="Print everything as JSON")
    return parser


def _devices(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


def _measure_here(options: dict[str, Any], device: str) -> None:
    if options.setdefault("device", device) != device:
        raise PlanError(f"--measure runs on this machine's device, {device}, got --device {options['device']}")


def _read_rates(path: str) -> "FlopRates":
    from rlhf_ppo.plan.compute import FlopRates

    try:
        content = json.loads(Path(path).read_text())
        return FlopRates(**(content.get("rates") or content["measured"]["rates"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{path} holds no measured rates: write it with `--measure --json > {path}`") from error


def _run_measurement(plan: PlanConfig) -> dict[str, Any]:
    """Run `rlhf_ppo.plan.measure` in a subprocess and return its result."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.json"
        settings.write_text(json.dumps(asdict(plan)))
        command = [sys.executable, "-W", "ignore", "-m", "rlhf_ppo.plan.measure", str(settings)]
        completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode:
        last_line = (completed.stderr.strip().splitlines() or ["killed"])[-1]
        raise PlanError(f"the measured iteration failed with status {completed.returncode}: {last_line}")
    measurement: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return measurement


if __name__ == "__main__":
    raise SystemExit(main())
