"""Held-out evaluations that go on where they were interrupted: each piece of the prompts is kept until the run ends."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.loop.evaluation import Evaluation
from rlhf_ppo.loop.run_folder import RunFolder
from rlhf_ppo.rollout.prompts import PromptDataset

from .cache import fingerprint

PIECES = 20
"""Of an evaluation: a killed one repeats at most one, 5 %. Several processes, which would have to agree, keep none."""
FOLDER = "evaluations.kept"
UNLEARNED = {"output_dir", "fresh", "threads", "log_with", "save_every", "max_time", "vllm_url"}
"""Settings of a run that change nothing of what is learned."""


@dataclass(frozen=True)
class KeptEvaluations:
    """Evaluates in pieces, each with draws of its own, and takes those that an interrupted run has finished.

    Args:
        run: Where pieces are kept; those of other settings are not taken.
        ask: Evaluates prompts, with the keyword `seed`.
    """

    run: RunFolder
    ask: Callable[..., Evaluation]

    def __call__(self, when: str, prompts: PromptDataset, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
        """The evaluation of all prompts at this time of the run."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return self.ask(prompts)
        size = math.ceil(len(prompts) / PIECES)
        settings = {name: value for name, value in self.run.config().items() if name not in UNLEARNED}
        key = fingerprint(when, settings)
        found = []
        for number, start in enumerate(range(0, len(prompts), size)):
            name = f"{FOLDER}/{key}-{number}.json"
            file = self.run.path / name
            if not file.is_file():
                piece = prompts.batch(range(start, min(start + size, len(prompts))))
                columns = {"input_ids": [ids.tolist() for ids in piece.input_ids], **piece.columns}
                evaluation = self.ask(PromptDataset(Dataset.from_dict(columns), tokenizer), seed=number)
                self.run.write_text(name, json.dumps(asdict(evaluation)))
            found.append(Evaluation(**json.loads(file.read_text(encoding="utf-8"))))
        return joined(found)

    def forget(self) -> None:
        """Remove all pieces: the run is finished."""
        shutil.rmtree(self.run.path / FOLDER, ignore_errors=True)


def joined(pieces: list[Evaluation]) -> Evaluation:
    """One after the other."""
    return Evaluation(
        prompts=[text for piece in pieces for text in piece.prompts],
        responses=[text for piece in pieces for text in piece.responses],
        measures={name: [value for piece in pieces for value in piece.measures[name]] for name in pieces[0].measures},
    )
