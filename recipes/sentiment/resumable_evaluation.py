"""Held-out evaluations that resume: each chunk of the prompts is saved until the run ends."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.loop.evaluation import Evaluation
from rlhf_ppo.loop.run_folder import RunFolder
from rlhf_ppo.rollout.prompts import PromptDataset

from .cache import fingerprint

CHUNKS = 20
"""Per evaluation: a killed one repeats at most one chunk, 5 %."""
CHUNKS_FOLDER = "evaluations.partial"
IRRELEVANT_SETTINGS = {"output_dir", "fresh", "threads", "log_with", "save_every", "max_time", "vllm_url"}
"""Settings of a run that change nothing of what is learned."""


class ResumableEvaluation:
    """Evaluate held-out prompts chunk by chunk, each with a seed of its own; load the chunks that are saved already.

    Several processes, which would have to agree on what is saved, evaluate in one go and save nothing.

    Args:
        run: Run folder that holds the chunks; chunks of other settings are not loaded.
        evaluate: `PPOTrainer.evaluate`.
        settings: Its keyword arguments.
    """

    def __init__(self, run: RunFolder, evaluate: Callable[..., Evaluation], **settings: Any) -> None:
        self.run, self.evaluate, self.settings = run, evaluate, settings

    def __call__(self, when: str, prompts: PromptDataset, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """Evaluate all prompts; `when` tells the evaluations of one run apart."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return self.evaluate(prompts, **self.settings)
        size = math.ceil(len(prompts) / CHUNKS)
        run_settings = {name: value for name, value in self.run.config().items() if name not in IRRELEVANT_SETTINGS}
        key = fingerprint(when, run_settings)
        evaluations = []
        for number, start in enumerate(range(0, len(prompts), size)):
            name = f"{CHUNKS_FOLDER}/{key}-{number}.json"
            path = self.run.path / name
            if not path.is_file():
                chunk = prompts.batch(range(start, min(start + size, len(prompts))))
                columns = {"input_ids": [ids.tolist() for ids in chunk.input_ids], **chunk.columns}
                dataset = PromptDataset(Dataset.from_dict(columns), tokenizer)
                self.run.write_text(name, json.dumps(asdict(self.evaluate(dataset, seed=number, **self.settings))))
            evaluations.append(Evaluation(**json.loads(path.read_text(encoding="utf-8"))))
        return concatenate(evaluations)


def concatenate(chunks: list[Evaluation]) -> Evaluation:
    """One evaluation of the prompts of all chunks, in their order."""
    return Evaluation(
        prompts=[text for chunk in chunks for text in chunk.prompts],
        responses=[text for chunk in chunks for text in chunk.responses],
        measures={name: [value for chunk in chunks for value in chunk.measures[name]] for name in chunks[0].measures},
    )


def remove_chunks(run: RunFolder) -> None:
    """Remove the saved chunks of a finished run."""
    shutil.rmtree(run.path / CHUNKS_FOLDER, ignore_errors=True)
