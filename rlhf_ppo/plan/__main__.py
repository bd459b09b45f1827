"""`python -m rlhf_ppo.plan`: what a run will need on each device, and how long it takes at measured rates."""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from rlhf_ppo.plan.compute import Rates, work
from rlhf_ppo.plan.config import PlanConfig, PlanError, read_config
from rlhf_ppo.plan.memory import make_plan
from rlhf_ppo.plan.tables import as_json, as_text
from rlhf_ppo.plan.traces import trace, weights_of

HELP = {
    "model": "gpt2, 1b, 7b, 70b, or a folder or file with a config.json",
    "reward_model": "the same for a reward model beside the policy (default: none)",
    "strategy": "ddp, zero1, zero2, zero3, fsdp",
    "precision": "float32, bf16-mixed, bfloat16, nf4 (QLoRA)",
    "device": "cuda, cpu; with --measure, the one that is here",
    "lora_rank": "0 trains every weight",
    "batch_size": "responses of one iteration, on each process",
    "mini_batch_size": "responses of one forward and backward pass",
    "gradient_accumulation_steps": "passes of one optimizer step",
    "ppo_epochs": "passes over an iteration's responses",
    "prompt_tokens": "longest prompt",
    "new_tokens": "longest response",
    "gradient_checkpointing": "recompute activations in the backward pass",
    "logits_chunk_size": "response tokens whose logits may live at once",
    "decode_rows": "rows decoded at once, at most",
    "kv_budget_gib": "keys and values alive at once, at most",
    "memory_gib": "memory of one device, to say what fits",
}


def main(arguments: list[str] | None = None) -> int:
    """Parse, plan, print. Exit status 2 for settings that cannot be planned."""
    options = vars(_parser().parse_args(arguments))
    config, gpus, rates, measured, as_data = (
        options.pop(name) for name in ("config", "gpus", "rates", "measure", "json")
    )
    try:
        if measured:
            options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        plan = read_config(config, **options) if config else _plain(options)
        if measured and plan.precision == "nf4":
            raise PlanError("--measure does not run nf4: plan it, or measure bfloat16")
        known = None if rates is None else _read_rates(rates)
        traces = trace(plan)
        reward = 0.0 if plan.reward_model is None else float(weights_of(plan, plan.reward_model))
        plans = [make_plan(plan, traces, devices=count, reward_weights=reward) for count in gpus]
        found = _measured(plan) if measured else None
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    if found is not None:
        known = Rates(**found["rates"])
    done = work(plan, traces)
    if as_data:
        print(json.dumps(as_json(plans, done, known) | {"measured": found}, indent=1))  # noqa: T201
        return 0
    print(as_text(plans, done, known))  # noqa: T201
    if found is not None:
        planned = make_plan(plan, traces).peak
        print(  # noqa: T201
            f"measured here, one process: peak {found['peak'] / 2**30:.3f} GiB, planned {planned / 2**30:.3f} "
            f"({planned / found['peak'] - 1:+.1%})"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_ppo.plan", description=__doc__,
        epilog="Memory is that of the code: its passes are traced on tensors without content. See docs/scaling.md.",
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
            kind = type(default) if default is not None else str
            parser.add_argument(flag, type=kind, default=None, help=text, metavar=kind.__name__.upper())
    parser.add_argument("--gpus", type=int, nargs="+", default=[1], help="numbers of devices (default: 1)")
    parser.add_argument("--rates", help="JSON file of an earlier `--measure --json`: its operations a second")
    parser.add_argument("--measure", action="store_true", help="run one iteration here and compare")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def _plain(options: dict[str, Any]) -> PlanConfig:
    return PlanConfig(**{name: value for name, value in options.items() if value is not None})


def _read_rates(path: str) -> Rates:
    try:
        content = json.loads(Path(path).read_text())
        return Rates(**(content.get("rates") or content["measured"]["rates"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{path} holds no measured rates: write it with `--measure --json > {path}`") from error


def _measured(plan: PlanConfig) -> dict[str, Any]:
    """`rlhf_ppo.plan.measure` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.json"
        settings.write_text(json.dumps(asdict(plan)))
        command = [sys.executable, "-W", "ignore", "-m", "rlhf_ppo.plan.measure", str(settings)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        raise PlanError(f"the measured iteration failed with status {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    raise SystemExit(main())
