"""A Bradley-Terry world with known utilities: what theory promises, training must deliver."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from reward_model import Comparison, RewardModel, RewardModelConfig, train_reward_model
from reward_model.evaluation.metrics import expected_calibration_error

ITEMS = 40
WORDS = [f"item{index}" for index in range(ITEMS)]


@pytest.fixture(scope="module")
def utilities() -> torch.Tensor:
    """True utilities of the items, standard normal times 1.5."""
    return 1.5 * torch.randn(ITEMS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer GPT-2 whose tokenizer has one token a word."""
    folder = tmp_path_factory.mktemp("synthetic")
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {word: 3 + index for index, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_layer=1, n_embd=32, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=1,
        pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pair(i: int, j: int, **changes: Any) -> Comparison:
    """Item i preferred to item j."""
    return Comparison(prompt="", completions=(WORDS[i], WORDS[j]), **changes)


def drawn_pairs(utilities: torch.Tensor, count: int, seed: int) -> list[Comparison]:
    """Pairs of different items, the preferred one drawn from the Bradley-Terry model."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(ITEMS, (count,), generator=generator)
    second = (first + torch.randint(1, ITEMS, (count,), generator=generator)) % ITEMS
    wins = torch.rand(count, generator=generator) < torch.sigmoid(utilities[first] - utilities[second])
    return [
        pair(i, j) if won else pair(j, i)
        for i, j, won in zip(first.tolist(), second.tolist(), wins.tolist(), strict=True)
    ]


def trained(base: Path, output: Path, train: list[Comparison], **changes: Any) -> RewardModel:
    settings: dict[str, Any] = {
        "model": str(base), "output_dir": str(output), "learning_rate": 3e-3, "batch_size": 128, "epochs": 2,
        "progress": False, "max_length": 8,
    }  # fmt: skip
    config = RewardModelConfig(**(settings | changes))
    held_out = [comparison for comparison in train if not comparison.is_tie][:64]
    return RewardModel.from_pretrained(train_reward_model(config, train=train, evaluation=held_out).path)


def scores_of_items(model: RewardModel) -> torch.Tensor:
    return torch.tensor(model.raw_scores([""] * ITEMS, WORDS), dtype=torch.float64)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a, b)))[0, 1])


@pytest.mark.slow
def test_the_known_utilities_are_recovered(base: Path, utilities: torch.Tensor, tmp_path: Path) -> None:
    """Held-out accuracy within 1.5 points of the Bayes rate, utilities correlate >= 0.98, ECE <= 0.03."""
    model = trained(base, tmp_path / "rm", drawn_pairs(utilities, 16_000, seed=1))
    found = scores_of_items(model)
    held_out = drawn_pairs(utilities, 20_000, seed=2)
    index = {word: position for position, word in enumerate(WORDS)}
    best = torch.tensor([index[str(c.completions[0])] for c in held_out])
    worst = torch.tensor([index[str(c.completions[1])] for c in held_out])
    bayes = float((utilities[best] > utilities[worst]).double().mean())
    accuracy = float((found[best] > found[worst]).double().mean())
    ece = expected_calibration_error(found[best] - found[worst])
    together = correlation(found, utilities)
    print(f"accuracy {accuracy:.4f}, Bayes rate {bayes:.4f}, correlation {together:.4f}, ECE {ece:.4f}")
    assert accuracy >= bayes - 0.015
    assert together >= 0.98
    assert ece <= 0.03


def two_items(base: Path, output: Path, train: list[Comparison], **changes: Any) -> float:
    """Trained difference of the raw scores of items 0 and 1."""
    settings: dict[str, Any] = {"epochs": 60.0, "batch_size": 20, "learning_rate": 1e-2}
    scores = scores_of_items(trained(base, output, train, **(settings | changes)))
    return float(scores[0] - scores[1])


def test_soft_labels_are_fitted_by_their_log_odds(base: Path, tmp_path: Path) -> None:
    difference = two_items(base, tmp_path / "rm", [pair(0, 1, preference=0.8)] * 20)
    assert difference == pytest.approx(math.log(4.0), abs=0.1)


def test_weights_count_as_copies(base: Path, tmp_path: Path) -> None:
    """Weight 3 for one order and 1 for the other: odds 3 : 1."""
    difference = two_items(base, tmp_path / "rm", [pair(0, 1, weight=3.0), pair(1, 0, weight=1.0)] * 10)
    assert difference == pytest.approx(math.log(3.0), abs=0.1)


def test_margins_push_scores_apart_by_as_much(base: Path, tmp_path: Path) -> None:
    """Both orders equally often, one with margin m: s(d - m) + s(d) = 1 at the optimum, so d = m / 2."""
    difference = two_items(base, tmp_path / "rm", [pair(0, 1, margin=2.0), pair(1, 0)] * 10)
    assert difference == pytest.approx(1.0, abs=0.1)


def test_label_smoothing_bounds_the_difference(base: Path, tmp_path: Path) -> None:
    """With every pair one way round the optimum is log((1 - e) / e) instead of infinity."""
    difference = two_items(base, tmp_path / "rm", [pair(0, 1)] * 20, label_smoothing=0.1)
    assert difference == pytest.approx(math.log(9.0), abs=0.15)


def test_ties_shrink_the_difference_as_davidson_says(base: Path, tmp_path: Path) -> None:
    """Half wins, half ties, nu = 1: the fitted points per game, P(win) + P(tie) / 2, equal the observed 3/4.

    With x = exp(d / 2): (x + 1/2) / (x + 1/x + 1) = 3/4, that is x^2 - x - 3 = 0.
    """
    difference = two_items(base, tmp_path / "rm", [pair(0, 1), pair(0, 1, ranks=(0, 0))] * 10)
    assert difference == pytest.approx(2 * math.log((1 + math.sqrt(13)) / 2), abs=0.1)


def test_centering_brings_the_mean_score_to_zero(base: Path, tmp_path: Path) -> None:
    model = trained(base, tmp_path / "rm", [pair(0, 1), pair(1, 0)] * 200, epochs=8.0, centering=0.1)
    assert abs(float(scores_of_items(model)[:2].mean())) < 0.05


@pytest.mark.slow
def test_rankings_recover_the_utilities_with_fewer_rows(base: Path, utilities: torch.Tensor, tmp_path: Path) -> None:
    """Plackett-Luce over four items: exp(utility) times an exponential clock, first to ring is best."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for _ in range(6_000):
        items = torch.randperm(ITEMS, generator=generator)[:4]
        clocks = -torch.rand(4, generator=generator, dtype=torch.float64).log() / utilities[items].exp()
        order = items[clocks.argsort()].tolist()
        rows.append(Comparison(prompt="", completions=tuple(WORDS[i] for i in order), ranks=(0, 1, 2, 3)))
    found = scores_of_items(trained(base, tmp_path / "rm", rows, batch_size=64))
    print(f"correlation {correlation(found, utilities):.4f}")
    assert correlation(found, utilities) >= 0.98
    slope = correlation(found, utilities) * float(found.std() / utilities.std())
    assert slope == pytest.approx(1.0, abs=0.15)  # log-odds, not only the order
