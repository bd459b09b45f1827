"""The sentiment recipe, unchanged, on two processes under `accelerate launch`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.distributed.launching import ROOT, launch
from tests.recipes.tiny_world import save_gpt2, save_reward_model, write_reviews

pytestmark = pytest.mark.distributed


def rows(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def test_the_recipe_runs_on_two_processes_and_resumes(tmp_path: Path) -> None:
    """Metrics are written once, by process 0. A run that lost its last checkpoint repeats its iteration, here in parts.

    Under DDP it would be to the last bit (test_loop.py). Under FSDP2 rows are padded instead of packed, and the recipe
    computes in bfloat16 where the processor can.
    """
    gpt2 = save_gpt2(tmp_path / "gpt2")
    options = {
        "model": gpt2, "reward-model": save_reward_model(tmp_path / "reward_model", gpt2),
        "dataset": write_reviews(tmp_path / "reviews.csv"), "output-dir": tmp_path / "run", "iterations": 3,
        "batch-size": 8, "mini-batch-size": 4, "learning-rate": 1e-3, "new-tokens": 6, "eval-prompts": 9,
        "save-every": 1, "threads": 1, "log-with": "tensorboard", "reward-calls": "once",
    }  # fmt: skip
    recipe = str(ROOT / "recipes" / "ppo_gpt2_sentiment.py")
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    # Port 0: any that is free.
    launcher = ("-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file")
    output = launch((*launcher, str(ROOT / "recipes/launch/cpu_2.yaml"), recipe, *arguments))
    assert output.count("[4/5] PPO") == 1
    first = rows(tmp_path / "run")
    assert [row["iteration"] for row in first] == [1, 2, 3]
    assert (tmp_path / "run" / "report.html").is_file()
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 9
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    shutil.rmtree(tmp_path / "run" / "model")
    launch((*launcher, str(ROOT / "recipes/launch/fsdp2_cpu.yaml"), recipe, *arguments))
    again = rows(tmp_path / "run")
    assert again[:2] == first[:2]
    assert again[2]["env/reward_mean"] == pytest.approx(first[2]["env/reward_mean"], rel=1e-3)
    assert again[2]["objective/kl"] == pytest.approx(first[2]["objective/kl"], rel=0.1)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
