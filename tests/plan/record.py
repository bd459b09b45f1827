"""Plans against measured peaks, one process each: `python -m tests.plan.record` writes docs/results/plan.json."""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import GPT2Config, LlamaConfig

from rlhf_ppo.plan import PlanConfig, make_plan, trace_memory

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "plan.json"
SHAPES = {
    "gpt2-6x256": GPT2Config(n_layer=6, n_embd=256, n_head=8),
    "llama-6x384": LlamaConfig(
        num_hidden_layers=6, hidden_size=384, intermediate_size=1024, num_attention_heads=6, vocab_size=32_000
    ),
    "gpt2": GPT2Config(),
}
BASE = PlanConfig(device="cpu", batch_size=16, mini_batch_size=8, ppo_epochs=1, prompt_tokens=32, new_tokens=32)
FITTED = 5
"""So many of the runs gave `rlhf_ppo.plan.memory.HEAP_OVERHEAD`."""
RUNS: dict[str, tuple[str, PlanConfig]] = {
    "small GPT-2": ("gpt2-6x256", replace(BASE, batch_size=32, mini_batch_size=16)),
    "small GPT-2, LoRA": ("gpt2-6x256", replace(BASE, batch_size=32, mini_batch_size=16, lora_rank=8)),
    "small Llama": ("llama-6x384", replace(BASE, prompt_tokens=64, new_tokens=64)),
    "small Llama, LoRA": ("llama-6x384", replace(BASE, prompt_tokens=64, new_tokens=64, lora_rank=8)),
    "GPT-2 124M, LoRA": ("gpt2", replace(BASE, batch_size=8, mini_batch_size=4, lora_rank=8)),
    # `HEAP_OVERHEAD` comes from those above, not from these.
    "small Llama, checkpointing": (
        "llama-6x384", replace(BASE, prompt_tokens=64, new_tokens=64, gradient_checkpointing=True),
    ),
    "small GPT-2, bf16-mixed": ("gpt2-6x256", replace(BASE, precision="bf16-mixed", prompt_tokens=64)),
    "small GPT-2, long": ("gpt2-6x256", replace(BASE, mini_batch_size=4, prompt_tokens=64, new_tokens=192)),
}  # fmt: skip


def compared(name: str, folder: Path) -> dict[str, Any]:
    """One run of `RUNS`: peak measured in a process of its own, and as planned."""
    shape, plan = RUNS[name]
    place = folder / shape
    SHAPES[shape].save_pretrained(place)
    plan = replace(plan, model=str(place))
    settings = folder / "settings.json"
    settings.write_text(json.dumps(asdict(plan)))
    command = [sys.executable, "-W", "ignore", "-m", "rlhf_ppo.plan.measure", str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    planned = make_plan(plan, trace_memory(plan))
    return {
        "name": name, "shape": shape, "fitted": list(RUNS).index(name) < FITTED,
        "measured": found["peak"], "planned": planned.peak,
        "error": planned.peak / found["peak"] - 1, "roles": planned.roles, "phases": planned.phases,
        "rates": found["rates"], "seconds": found["seconds"],
        "config": {key: value for key, value in found["config"].items() if key != "model"},
    }  # fmt: skip


def main(names: list[str]) -> None:
    """All runs, or those named; results are written as they come."""
    known = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    runs = {run["name"]: run for run in known}
    for name in names or list(RUNS):
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = compared(name, Path(folder))
        RESULTS.write_text(json.dumps({"runs": [runs[key] for key in RUNS if key in runs]}, indent=1) + "\n")
        print(name, *(f"{runs[name][key] / 2**20:.0f}" for key in ("measured", "planned")), runs[name]["error"])


if __name__ == "__main__":
    main(sys.argv[1:])
