"""Plan 1B, 7B and 70B on 1 to 1024 devices: writes docs/results/scaling.json and the table in docs/scaling.md.

python docs/results/scaling.py
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlhf_ppo.plan import MemoryTraces, PlanConfig, make_plan, trace_memory
from rlhf_ppo.plan.compute import iteration_flops
from rlhf_ppo.plan.memory import GIB

HERE = Path(__file__).parent
BEGIN, END = "<!-- scaling -->", "<!-- /scaling -->"
"""Around the table."""
DEVICES = (1, 8, 64, 1024)
BASE = PlanConfig(
    precision="bf16-mixed", batch_size=64, mini_batch_size=2, ppo_epochs=1, prompt_tokens=512, new_tokens=512,
    gradient_checkpointing=True, kv_budget_gib=16.0,
)  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "DDP": {"strategy": "ddp"},
    "ZeRO-2": {"strategy": "zero2"},
    "ZeRO-3": {"strategy": "zero3"},
    "FSDP": {"strategy": "fsdp"},
    "DDP, LoRA 16 on bf16": {"strategy": "ddp", "lora_rank": 16, "precision": "bfloat16"},
    "DDP, LoRA 16 on NF4": {"strategy": "ddp", "lora_rank": 16, "precision": "nf4"},
    "ZeRO-3, LoRA 16 on bf16": {"strategy": "zero3", "lora_rank": 16, "precision": "bfloat16"},
}


def main() -> None:
    """Trace each model once a precision; share it in every way."""
    known: dict[tuple[str, int, bool], MemoryTraces] = {}
    rows = [row_of(model, way, known) for model in ("1b", "7b", "70b") for way in WAYS]
    (HERE / "scaling.json").write_text(json.dumps({"config": asdict(BASE), "rows": rows}, indent=1) + "\n")
    page = HERE.parent / "scaling.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(before + BEGIN + "\n" + table(rows) + END + rest.split(END)[1])


def row_of(model: str, way: str, known: dict[tuple[str, int, bool], MemoryTraces]) -> dict[str, Any]:
    """One row; `known` keeps the traces, since all that is sharded is traced alike."""
    config = replace(BASE, model=model, **WAYS[way])
    kind = (model, config.lora_rank, config.strategy == "ddp")
    if kind not in known:
        known[kind] = trace_memory(config)
    traces = known[kind]
    plans = [make_plan(config, traces, devices=count) for count in DEVICES]
    return {
        "model": model, "way": way, "parameters": traces.parameters, "work": asdict(iteration_flops(config, traces)),
        "peaks": {plan.devices: plan.phases for plan in plans},
        "roles": {plan.devices: plan.roles for plan in plans},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Peak GiB of one device, the phase of the peak, and the work of an iteration."""
    lines = [
        "Planned, not measured: peak GiB of one device (u: in the update, r: in the rollout); bold if above 80.",
        f"{BASE.batch_size} responses a device and iteration, {BASE.prompt_tokens} + {BASE.new_tokens} tokens.",
        f"Micro-batches of {BASE.mini_batch_size}, bf16-mixed unless said, gradient checkpointing, one epoch.",
        "",
        "| Model | Way | " + " | ".join(f"{count} GPU" for count in DEVICES) + " | PFLOP an iteration and device |",
        "|---|---|" + "---|" * (len(DEVICES) + 1),
    ]
    for row in rows:
        cells = []
        for count in DEVICES:
            phases = row["peaks"][count]
            phase = max(phases, key=phases.get)
            text = f"{phases[phase] / GIB:.0f}{phase[0]}"
            cells.append(f"**{text}**" if phases[phase] > 80 * GIB else text)
        total = sum(row["work"][phase] for phase in ("rollout", "scoring", "update")) / 1e15
        lines.append(f"| {row['model']} | {row['way']} | " + " | ".join(cells) + f" | {total:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
