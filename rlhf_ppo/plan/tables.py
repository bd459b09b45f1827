"""Format plans as text and JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rlhf_ppo.plan.compute import FlopRates, IterationFlops
from rlhf_ppo.plan.memory import GIB, ROLES, Plan


def as_text(plans: Sequence[Plan], flops: IterationFlops, rates: FlopRates | None) -> str:
    """Format plans as a table in GiB: one column per number of devices, one row per role and phase."""
    width = 12
    header = "".join(f"{plan.devices:>{width}}" for plan in plans)
    config = plans[0].config
    adapters = f", LoRA rank {config.lora_rank}" if config.lora_rank else ""
    passes = f"passes of {config.mini_batch_size} responses{', checkpointing' if config.gradient_checkpointing else ''}"
    lines = [
        f"{config.model}, {config.precision}, {config.strategy}{adapters}, {passes}: GiB on each device",
        f"{'devices':<14}{header}",
    ]
    for role in ROLES:
        lines.append(f"{role:<14}" + "".join(f"{plan.roles[role] / GIB:>{width}.3f}" for plan in plans))
    for phase in plans[0].phases:
        lines.append(f"peak {phase:<9}" + "".join(f"{plan.phases[phase] / GIB:>{width}.3f}" for plan in plans))
    verdicts = ["yes" if plan.fits else "NO" for plan in plans]
    fits = f"fits {config.memory_gib:g} GiB"
    lines.append(f"{fits:<14}" + "".join(f"{verdict:>{width}}" for verdict in verdicts))
    teraflops = {phase: value / 1e12 for phase, value in asdict(flops).items() if phase != "response_tokens"}
    lines.append("TFLOP of one iteration on each device: " + ", ".join(f"{k} {v:.3g}" for k, v in teraflops.items()))
    if rates is None:
        lines.append("time: unknown, no measured rates were given (--measure, --rates)")
    else:
        seconds = flops.seconds(rates)
        total = sum(seconds.values())
        phase_times = ", ".join(f"{phase} {value:.1f} s" for phase, value in seconds.items())
        speeds = ", ".join(f"{plan.devices}: {plan.devices * flops.response_tokens / total:,.0f}" for plan in plans)
        lines.append(f"time of one iteration: {phase_times}; {total:.1f} s in all, communication not counted")
        lines.append(f"response tokens per second by number of devices: {speeds}")
    return "\n".join(lines)


def as_json(plans: Sequence[Plan], flops: IterationFlops, rates: FlopRates | None) -> dict[str, Any]:
    """Convert plans, FLOPs and rates to a dict for JSON, in bytes and FLOPs."""
    return {
        "config": asdict(plans[0].config),
        "plans": [
            {"devices": plan.devices, "roles": plan.roles, "phases": plan.phases, "peak": plan.peak, "fits": plan.fits}
            for plan in plans
        ],
        "work": asdict(flops),
        "rates": None if rates is None else asdict(rates),
    }
