"""`python -m rlhf_ppo.plan`: memory of a run on each device, and its time at measured FLOP rates."""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ppo.plan.config import PlanConfig, PlanError, read_config

if TYPE_CHECKING:
    from rlhf_ppo.plan.compute import FlopRates

HELP = {
    "model": "gpt2, 1b, 7b, 70b, or a folder or file with a config.json",
    "reward_model": "the same for a reward model beside the policy (default: none)",
    "strategy": "ddp, zero1, zero2, zero3, fsdp",
    "precision": "auto, float32, bf16-mixed, bfloat16, nf4 (QLoRA)",
    "device": "cuda, cpu; with --measure, the device of this machine",
    "lora_rank": "0 trains every weight",
    "batch_size": "responses per iteration, on each process",
    "mini_batch_size": "responses per forward and backward pass, at most",
    "token_budget": "tokens per forward and backward pass; on cuda by default what fits",
    "gradient_accumulation_steps": "passes per optimizer step",
    "ppo_epochs": "passes over the responses of an iteration",
    "prompt_tokens": "tokens of the longest prompt",
    "new_tokens": "tokens of the longest response",
    "gradient_checkpointing": "recompute activations in the backward pass",
    "logits_chunk_size": "response tokens whose logits are computed at once",
    "decode_rows": "maximum rows decoded at once",
    "kv_budget_gib": "maximum size of the KV cache; by default half of a GPU's free memory, else 4",
    "memory_gib": "memory of one device, to check what fits",
}


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
    from rlhf_ppo.plan.traces import trace_memory, weight_bytes

    try:
        if measure:
            options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        plan = read_config(config, **options) if config else _config_from_options(options)
        if measure and plan.precision == "nf4":
            raise PlanError("--measure does not run nf4: plan it, or measure bfloat16")
        rates = None if rates is None else _read_rates(rates)
        plan = with_fitted_pass_size(plan)
        traces = trace_memory(plan)
        reward = 0.0 if plan.reward_model is None else float(weight_bytes(plan, plan.reward_model))
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
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_ppo.plan", description=__doc__,
        epilog="Memory is traced from the code itself, run on fake tensors. See docs/scaling.md.",
    )  # fmt: skip
    parser.add_argument("--config", help="YAML or JSON file with any of these settings; options below win")
    defaults = PlanConfig()
    for item in fields(PlanConfig):
        default = getattr(defaults, item.name)
        flag = "--" + item.name.replace("_", "-")
        text = f"{HELP[item.name]} (default: {default})" if default is not None else HELP[item.name]
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            optional = {"int | None": int, "float | None": float}.get(str(item.type), str)
            kind = optional if default is None else type(default)
            parser.add_argument(flag, type=kind, default=None, help=text, metavar=kind.__name__.upper())
    parser.add_argument("--gpus", type=int, nargs="+", default=[1], help="numbers of devices (default: 1)")
    parser.add_argument("--rates", help="JSON file of an earlier `--measure --json` with its FLOP rates")
    parser.add_argument("--measure", action="store_true", help="run one iteration on this machine and compare")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def _config_from_options(options: dict[str, Any]) -> PlanConfig:
    return PlanConfig(**{name: value for name, value in options.items() if value is not None})


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
