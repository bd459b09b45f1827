"""Everything that the sentiment recipe needs, tiny and local: reviews, policies, reward models, the classic pair."""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

from reward_model import RewardModelConfig, train_reward_model
from tests.support.tiny_models import VOCAB_SIZE, tiny_gpt2, tiny_llama, tiny_tokenizer

OPENINGS = ["The movie", "This film", "I", "We went to the cinema and", "What a story:", "My morning began and"]
SUBJECTS = ["the actors", "the plot", "the music", "the ending", "the story", "my friends", "the camera", "the cast"]
GOOD = ["was good", "was great", "was lovely", "was wonderful", "I liked it", "it was a joy"]
BAD = ["was bad", "was boring", "was terrible", "was awful", "I did not like it", "it was a disappointment"]


def review_rows(count: int = 240, *, seed: int = 0) -> list[tuple[str, int]]:
    """Reviews of two or three sentences with their labels, half of them positive, no two alike."""
    draw = random.Random(seed)
    rows: dict[str, int] = {}
    while len(rows) < count:
        label = len(rows) % 2
        phrases = [f"{draw.choice(SUBJECTS)} {draw.choice(GOOD if label else BAD)}" for _ in range(4)]
        rows[f"{draw.choice(OPENINGS)} {phrases[0]} and {phrases[1]}. {phrases[2]}, and {phrases[3]}."] = label
    return list(rows.items())


def write_reviews(path: Path, *, text: str = "text", label: str = "label", count: int = 240) -> Path:
    """A CSV file of reviews with these column names."""
    lines = [f"{text},{label}", *(f'"{review}",{positive}' for review, positive in review_rows(count))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_gpt2(folder: Path, *, vocab_size: int = VOCAB_SIZE, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """A random GPT-2 folder with a tokenizer."""
    tiny_gpt2(vocab_size=vocab_size).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """A random Llama folder with a tokenizer."""
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_classic_policy(folder: Path) -> Path:
    """Like lvwerra/gpt2-imdb: a GPT-2 whose tokenizer has one special token, for beginning and end, and no padding."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.bos_token = tokenizer.eos_token
    return save_gpt2(folder, tokenizer=tokenizer)


def save_classic_classifier(folder: Path) -> Path:
    """Like lvwerra/distilbert-imdb: a DistilBERT that tells NEGATIVE from POSITIVE."""
    config = DistilBertConfig(
        vocab_size=VOCAB_SIZE, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=128,
        pad_token_id=0, id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        DistilBertForSequenceClassification(config).save_pretrained(folder)
    tiny_tokenizer(padding_side="right").save_pretrained(folder)
    return folder


def save_reward_model(folder: Path, base: Path, **settings: Any) -> Path:
    """A reward model trained on a few pairs, as recipes/train_reward_model.py would leave it."""
    draw = random.Random(0)
    pairs = [{"prompt": "", "chosen": draw.choice(GOOD), "rejected": draw.choice(BAD)} for _ in range(48)]
    config = RewardModelConfig(
        model=str(base), output_dir=str(folder), learning_rate=1e-3, batch_size=16, max_length=64, progress=False,
        **settings,
    )  # fmt: skip
    return train_reward_model(config, train=pairs[:32], evaluation=pairs[32:]).path
