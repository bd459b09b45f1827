"""The sentiment recipe, unchanged, on two processes under `accelerate launch`."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.distributed.launching import ROOT, launch_file
from tests.recipes.tiny_world import save_gpt2, save_reward_model, write_reviews

pytestmark = pytest.mark.distributed

RECIPE = ROOT / "recipes" / "ppo_gpt2_sentiment.py"
FLOAT32_RECIPE = Path(__file__).with_name("float32_recipe.py")


def rows(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def arguments(tmp_path: Path, output: str) -> list[str]:
    """Of a recipe on a tiny world."""
    gpt2 = save_gpt2(tmp_path / "gpt2")
    options = {
        "model": gpt2, "reward-model": save_reward_model(tmp_path / "reward_model", gpt2),
        "dataset": write_reviews(tmp_path / "reviews.csv"), "output-dir": tmp_path / output, "iterations": 3,
        "batch-size": 8, "mini-batch-size": 4, "learning-rate": 1e-3, "new-tokens": 6, "eval-prompts": 9,
        "save-every": 1, "threads": 1, "log-with": "tensorboard", "reward-calls": "once",
    }  # fmt: skip
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def test_the_recipe_runs_on_two_processes_and_resumes(tmp_path: Path) -> None:
    """Process 0 writes the metrics. A run without its last checkpoint repeats that iteration, here sharded.

    Under DDP it would be to the last bit (test_loop.py). Under FSDP2 rows are padded, not packed. In bfloat16, that
    alone moves a KL of 0.013 nats to 0.019, so both runs are in float32, whatever the processor.
    """
    told = arguments(tmp_path, "run")
    output = launch_file("cpu_2", FLOAT32_RECIPE, *told)
    assert output.count("[4/5] PPO") == 1
    first = rows(tmp_path / "run")
    assert [row["iteration"] for row in first] == [1, 2, 3]
    assert (tmp_path / "run" / "report.html").is_file()
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == 9
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    shutil.rmtree(tmp_path / "run" / "model")
    launch_file("fsdp2_cpu", FLOAT32_RECIPE, *told)
    again = rows(tmp_path / "run")
    assert again[:2] == first[:2]
    assert again[2]["env/reward_mean"] == pytest.approx(first[2]["env/reward_mean"], rel=1e-3)
    assert again[2]["objective/kl"] == pytest.approx(first[2]["objective/kl"], rel=0.1)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: make test-distributed installs it")
def test_the_recipe_runs_under_zero_3_with_everything_offloaded_and_goes_on(tmp_path: Path) -> None:
    """Without a word about the missing GPU, in the precision of the launch file."""
    told = arguments(tmp_path, "run")
    launch_file("zero3_offload", RECIPE, *told, mixed_precision="bf16")
    first = rows(tmp_path / "run")
    assert [row["iteration"] for row in first] == [1, 2, 3]
    assert abs(first[0]["objective/kl"]) < 1e-4, "policy and reference start from the same numbers"
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    shutil.rmtree(tmp_path / "run" / "model")
    launch_file("zero3_offload", RECIPE, *told, mixed_precision="bf16")
    assert rows(tmp_path / "run") == first
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
