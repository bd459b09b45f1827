"""The recipe's pieces around PPO: settings, run folder, reward sources, prompt sets, command line."""

import math
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ppo.loop.evaluation import Evaluation
from rlhf_ppo.report import RunFolder
from sentiment import evaluation, rewards
from sentiment.command_line import Phases, fitted, one_line, open_run_folder, reason, unboxed
from sentiment.language_models import EMBEDDED_MODELS
from sentiment.reviews import Review, load_reviews, split_reviews
from sentiment.settings import RecipeSettings, model_settings, resolve_settings
from tests.recipes.tiny_world import save_classic_classifier, save_gpt2, save_reward_model, write_reviews
from tests.support.tiny_models import tiny_tokenizer


@pytest.mark.parametrize("model", [*EMBEDDED_MODELS, "any/other"])
def test_the_command_line_overrides_a_preset_field_by_field(model: str) -> None:
    known = model_settings(model)
    assert resolve_settings(model, RecipeSettings()) == known
    mine = resolve_settings(model, RecipeSettings(kl_coef=0.0, lora_rank=0, bfloat16=False))
    assert (mine.kl_coef, mine.lora_rank, mine.bfloat16) == (0.0, 0, False)
    assert mine.learning_rate == known.learning_rate and mine.iterations == known.iterations


def test_settings_that_cannot_work_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="ppo_epochs must be at least 1, got 0"):
        resolve_settings("any", RecipeSettings(ppo_epochs=0))
    with pytest.raises(ValueError, match="score_clip must be positive and finite, got inf"):
        resolve_settings("any", RecipeSettings(score_clip=math.inf))
    with pytest.raises(ValueError, match="vf_coef must be at least 0, got nan"):
        resolve_settings("any", RecipeSettings(vf_coef=math.nan))
    with pytest.raises(ValueError, match="batch_size 100 is no multiple of mini_batch_size 128"):
        resolve_settings("any", RecipeSettings(batch_size=100))


def test_a_run_folder_takes_new_settings_until_it_holds_a_checkpoint(tmp_path: Path) -> None:
    open_run_folder(str(tmp_path / "run"), {"seed": 0}, fresh=False)
    open_run_folder(str(tmp_path / "run"), {"seed": 1}, fresh=False)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds a run with seed=1 \(now 2\)"):
        open_run_folder(str(tmp_path / "run"), {"seed": 2, "threads": 4}, fresh=False)
    open_run_folder(str(tmp_path / "run"), {"seed": 1, "threads": 4, "output_dir": "moved"}, fresh=False)
    folder = open_run_folder(str(tmp_path / "run"), {"seed": 2}, fresh=True)
    assert not checkpoint.exists() and folder.config() == {"seed": 2}


def test_the_classifiers_reward_is_the_logit_of_its_positive_class(tmp_path: Path) -> None:
    """Whatever stands beside a text in the batch; the class is found by its name."""
    folder = save_classic_classifier(tmp_path / "classifier")
    reward = rewards.reward_source(str(folder), split_reviews(load_reviews(str(write_reviews(tmp_path / "r.csv")))))[0]
    prompts, responses = ["The movie", "I"], [" was good.", " did not like this film, the plot was boring."]
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    expected = []
    with torch.no_grad():
        for prompt, response in zip(prompts, responses, strict=True):
            expected.append(float(model(**tokenizer(prompt + response, return_tensors="pt")).logits[0, 1]))
    assert reward(prompts=prompts, responses=responses) == pytest.approx(expected, abs=1e-5)


def test_every_process_attaches_the_reward_adapter_and_process_0_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 0 alone had it, and DDP broadcast its parameters to processes that had others."""
    attach = Mock()
    monkeypatch.setattr(rewards, "reward_on_policy", attach)
    settings = rewards.AdapterSettings(reward_on_base=True, reward_calls="once")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        reward, line = rewards.build_reward(settings, torch.nn.Linear(1, 1), "folder", None)  # type: ignore[arg-type]
        assert attach.call_count == int(rank) + 1 and (reward is attach.return_value) is (rank == "0") is bool(line)
    with pytest.raises(RuntimeError, match="only process 0 asks the reward model"):
        reward()


def test_a_model_without_a_trained_head_is_no_reward_model(tmp_path: Path) -> None:
    """transformers would draw the head at random: rewards would be noise, silently."""
    with pytest.raises(ValueError, match=r"no trained classification head \(score.weight missing\)"):
        rewards.SentimentClassifier(str(save_gpt2(tmp_path / "gpt2")))


def test_a_reward_model_is_known_by_its_contract(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "reward_model", save_gpt2(tmp_path / "gpt2"))
    rewards.check_reward_source(str(folder))
    reward, line = rewards.reward_source(str(folder), None)  # type: ignore[arg-type]
    assert line == f"loaded from {folder}" and len(reward(prompts=["a"], responses=[" b"])) == 1


def test_held_out_pairs_exist_however_the_labels_are_dealt() -> None:
    """Both labels occur among the held-out reviews, even where the first tenth has one alone."""
    reviews = [Review(f"text {i}", int(i >= 7)) for i in range(20)]
    assert [rewards._first(label, reviews) for label in (0, 1)] == [1, 8]


def test_held_out_prompts_are_not_trained_on_and_too_few_are_an_error(tmp_path: Path) -> None:
    parts = split_reviews(load_reviews(str(write_reviews(tmp_path / "reviews.csv"))))
    training, held_out = evaluation.prompt_datasets(parts, tiny_tokenizer(), held_out=8)
    assert len(held_out) == 8
    assert not set(training.batch(range(len(training))).texts) & set(held_out.batch(range(8)).texts)
    with pytest.raises(ValueError, match="lower --eval-prompts or give more reviews"):
        evaluation.prompt_datasets(parts, tiny_tokenizer(), held_out=500)


def test_the_estimates_add_variety_and_perplexity_with_their_errors(tmp_path: Path) -> None:
    """exp(nll) has the standard error exp(nll) x that of nll, to first order."""
    names = ("score", "vader", "classifier", "kl", "reference_nll")
    found = Evaluation(
        prompts=["a", "b"], responses=["one two", "one two"], measures={name: [1.0, 3.0] for name in names}
    )
    table = evaluation.estimates(found)
    assert table["score"] == (2.0, 1.0)
    assert table["perplexity"] == pytest.approx((math.exp(2.0), math.exp(2.0)))
    assert table["distinct_2"][0] == 0.5 and table["repetition"][0] == 0.0
    assert "perplexity 7.389 ± 7.389" in evaluation.describe(found)
    folder = RunFolder.create(tmp_path)
    evaluation.write_run(folder, found, found, title="A run")
    assert [sample.after_scores["kl"] for sample in folder.samples()] == [1.0, 3.0]


def test_phases_are_numbered_and_only_the_main_process_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    phase = Phases(2)
    phase("first")
    monkeypatch.setenv("RANK", "1")
    phase("second")
    assert capsys.readouterr().out == "[1/2] first (0 s)\n"


def test_a_terminal_gets_lines_broken_between_words_and_a_file_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "score 0.097 ± 0.049  vader -0.019 ± 0.023  classifier 0.454 ± 0.015  kl 0.000 ± 0.000"
    monkeypatch.setenv("COLUMNS", "60")
    assert fitted(line) == line
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    lines = fitted(f"{line}\nreport: /a-long/path/{'x' * 60}").split("\n")
    assert " ".join(part.strip() for part in lines[:2]) == line and max(map(len, lines[:2])) <= 60
    assert lines[-1].strip() == f"/a-long/path/{'x' * 60}"


def test_a_box_becomes_sentences() -> None:
    frame = (
        "╭─ Unrecognized options ─────╮\n│ Unrecognized: --a, 3 │\n"
        "│ ─────────── │\n│ Perhaps: │\n│   --b INT │\n╰──────╯\n"
    )
    plain = (
        " Unrecognized options \n ---------------\n  Unrecognized: --a, 3 \n  ---------- \n Perhaps: \n   --b INT \n"
    )
    assert unboxed(frame) == unboxed(plain) == "Unrecognized: --a, 3. Perhaps: --b INT"
    assert unboxed("no box at all\n") == "no box at all"


def test_other_libraries_messages_become_one_line() -> None:
    error = OSError("It cannot be reached.\nCheck your connection\nor read https://example.org.")
    assert one_line(error) == "It cannot be reached. Check your connection or read https://example.org."
    assert reason(error) == "It cannot be reached"
    assert one_line(ValueError()) == reason(ValueError()) == "ValueError"
