"""One side of `tests.benchmarks.pairs` in a process of its own: an epoch over preference pairs."""

import json
import random
from pathlib import Path
from typing import Any

from tests.benchmarks.sides import serve
from tests.benchmarks.workloads import Task

LEARNING_RATE = 1e-30
"""Nothing moves: the work is the same, and the mean loss over an epoch does not depend on the order of the pairs."""


class PairSide:
    """The same model and pairs on either side."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        from transformers import AutoModelForSequenceClassification

        self.folder = folder
        self.workload = Task.read(folder).workload
        self.tokenizer = Task.read(folder).tokenizer()
        self.model = AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=1)
        self.pairs: list[tuple[list[int], list[int]]] = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
        self.trainer: Any = self.build()

    def build(self) -> Any:
        """A trainer over the pairs."""
        raise NotImplementedError

    def epoch(self) -> dict[str, float]:
        """Train once over all pairs; their mean loss."""
        return {"loss": self.trainer.train().training_loss}


class Ours(PairSide):
    """`reward_model`'s trainer."""

    fast = True
    """Whether with its fast paths."""

    def build(self) -> Any:
        import datasets

        from reward_model.models.encoding import ComparisonCollator
        from reward_model.training.arguments import trainer_arguments
        from reward_model.training.config import RewardModelConfig
        from reward_model.training.preference_trainer import PreferenceTrainer

        rows = [
            {
                "chosen_ids": chosen, "rejected_ids": rejected, "middle_ids": [], "ranks": [0, 1], "margin": 0.0,
                "weight": 1.0, "preference": 1.0, "tie": False, "length": max(len(chosen), len(rejected)),
            }
            for chosen, rejected in self.pairs
        ]  # fmt: skip
        settings = RewardModelConfig(
            model=str(self.folder), output_dir=str(self.folder / "ours"), batch_size=self.workload.minibatch,
            learning_rate=LEARNING_RATE, epochs=1, evaluations=1, checkpoints=0, progress=False, precision="float32",
            packing=self.fast, fast_products=self.fast,
        )  # fmt: skip
        return PreferenceTrainer(
            settings=settings, has_ties=False, model=self.model, args=trainer_arguments(settings, len(rows)),
            train_dataset=datasets.Dataset.from_list(rows), processing_class=self.tokenizer,
            data_collator=ComparisonCollator(pad_token_id=0),
        )  # fmt: skip


class Plain(Ours):
    """The same trainer with padding through the layers and torch's own products."""

    fast = False


class Classic(PairSide):
    """TRL 0.11.4's `RewardTrainer`."""

    def build(self) -> Any:
        import datasets
        from trl import RewardConfig, RewardTrainer

        rows = [
            {
                "input_ids_chosen": chosen, "attention_mask_chosen": [1] * len(chosen),
                "input_ids_rejected": rejected, "attention_mask_rejected": [1] * len(rejected),
            }
            for chosen, rejected in self.pairs
        ]  # fmt: skip
        arguments = RewardConfig(
            output_dir=str(self.folder / "classic"), per_device_train_batch_size=self.workload.minibatch,
            num_train_epochs=1, learning_rate=LEARNING_RATE, max_length=self.workload.prompt + self.workload.cap,
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
        )  # fmt: skip

        class Compatible(RewardTrainer):
            """Takes the argument that transformers 4.46 passes and TRL 0.11.4 does not know."""

            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: object) -> Any:
                return super().compute_loss(model, inputs, return_outputs)

        return Compatible(
            model=self.model, args=arguments, tokenizer=self.tokenizer, train_dataset=datasets.Dataset.from_list(rows)
        )


def write_pairs(folder: Path) -> None:
    """Two responses to each prompt, cut from those of the task: lengths of one pair are unlike, as in real data."""
    task = Task.read(folder)
    draw = random.Random(0)
    responses = [response.tolist() for response in task.responses]
    prompts = [prompt.tolist() for prompt in task.workload.prompts()]
    pairs = [(prompt + one, prompt + draw.choice(responses)) for prompt, one in zip(prompts, responses, strict=True)]
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")


if __name__ == "__main__":
    serve({"ours": Ours, "plain": Plain, "classic": Classic})
