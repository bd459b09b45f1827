"""Speed is not bought with learning: the same task, seed by seed, on the fast path and on the plain one.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.learning --seeds 0 1 2 3 4

A small random GPT-2 learns to write a letter, its KL to the reference held near a target; the responses end by
themselves, so that their lengths differ. Both paths have the same prompts, settings and seeds, but their samplers draw
other random numbers: the runs are two samples of one distribution if the paths are equal. Finished runs are kept in
`--output`; an interrupted command goes on with the next one.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.transformers_generate import TransformersGenerate
from tests.benchmarks.plain import PlainTrainer, plain_config
from tests.benchmarks.records import processor, revision
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_gpt2, tiny_tokenizer

PATHS = ("fast", "plain")
WORDS = ("The movie", "This film was", "I liked", "My morning began with", "We went to see", "What a", "It was", "Our")
SAMPLING = SamplingConfig(max_new_tokens=24, stop_token_ids=(EOS_TOKEN_ID,))


def score(prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float]:
    """How often a response has the letter e, at most ten times."""
    return [float(min(10, response.count("e"))) for response in responses]


def run(path: str, seed: int, iterations: int) -> dict[str, float]:
    """Train once; score and KL on held-out draws before and after."""
    tokenizer = tiny_tokenizer()
    prompts = PromptDataset.from_texts(list(WORDS) * 8, tokenizer)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(n_embd=64, seed=0))
    kind, build = (PPOTrainer, PPOConfig) if path == "fast" else (PlainTrainer, plain_config)
    config = build(
        seed=seed, batch_size=64, mini_batch_size=16, learning_rate=3e-4, init_kl_coef=0.2, target=6.0, horizon=1000
    )  # fmt: skip
    trainer = kind(config, model, None, tokenizer, prompts)
    start = time.process_time()
    loop = TrainConfig(iterations=iterations, sampling=SAMPLING, progress=False, keep_history=iterations)
    sampler = None if path == "fast" else TransformersGenerate()
    before = trainer.evaluate(prompts, score, SAMPLING, seed=1)
    history = trainer.train(score, loop, sampler=sampler).history
    after = trainer.evaluate(prompts, score, SAMPLING, seed=1)
    return {
        "score_before": before.summary()["score"]["mean"], "score": after.summary()["score"]["mean"],
        "kl": after.summary()["kl"]["mean"], "largest_kl": max(row["objective/kl"] for row in history),
        "cpu": time.process_time() - start,
    }  # fmt: skip


def verdict(runs: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """For score and KL: the mean of either path, their distance, and the spread over seeds that it must stay within."""
    found = {}
    for measure in ("score", "kl"):
        values = {path: [row[measure] for row in runs[path].values()] for path in PATHS}
        means = {path: statistics.mean(of) for path, of in values.items()}
        spread = statistics.mean(statistics.variance(of) for of in values.values()) ** 0.5
        found[measure] = means | {"distance": abs(means["fast"] - means["plain"]), "spread": spread}
    return found


def main() -> None:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("docs/results/performance-learning.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"runs": {path: {} for path in PATHS}}
    if options.output.exists():
        found = json.loads(options.output.read_text(encoding="utf-8"))
    for seed in options.seeds:
        for path in PATHS:
            if str(seed) in found["runs"][path]:
                continue
            found["runs"][path][str(seed)] = run(path, seed, options.iterations)
            found |= {"iterations": options.iterations, "commit": revision("HEAD"), "machine": processor()}
            if all(len(runs) > 1 for runs in found["runs"].values()):
                found["verdict"] = verdict(found["runs"])
            options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
