"""The sentiment recipe from its settings to its run folder: tiny models, generated reviews, no network."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ppo_gpt2_sentiment as recipe
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.loop.signals import EXIT_RESUMABLE
from rlhf_ppo.report import RunFolder
from sentiment import command_line, evaluation, rewards
from sentiment.reviews import load_reviews, split_reviews
from tests.recipes.tiny_world import (
    save_classic_classifier,
    save_classic_policy,
    save_llama,
    save_reward_model,
)

Measures = dict[str, dict[str, tuple[float, float]]]


def settings(world: Path, output: Path, **changes: Any) -> recipe.Config:
    """A run of seconds."""
    tiny: dict[str, Any] = {
        "model": str(world / "gpt2"), "reward_model": str(world / "reward_model"),
        "dataset": str(world / "reviews.csv"), "output_dir": str(output), "iterations": 3, "batch_size": 8,
        "mini_batch_size": 4, "learning_rate": 1e-3, "new_tokens": 6, "eval_prompts": 8, "save_every": 2, "threads": 1,
        "log_with": None,
    }  # fmt: skip
    return recipe.Config(**(tiny | changes))


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Measures]:
    """A finished run with TensorBoard, for all tests that only look at one."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, recipe.main(settings(world, folder, log_with="tensorboard"))


def means(measures: Measures) -> dict[str, float]:
    """One number a measure."""
    return {f"{when}/{name}": mean for when, found in measures.items() for name, (mean, _) in found.items()}


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds; one test looks at it."""
    monkeypatch.setattr(evaluation, "write_report", lambda path, title: path / "report.html")


def untimed(folder: Path) -> list[dict[str, float]]:
    """Metrics without clock times, work counters and the names of reward sources."""
    other = ("time/", "work/", "env/reward/")
    rows = RunFolder.open(folder).metrics()
    return [{name: value for name, value in row.items() if not name.startswith(other)} for row in rows]


def test_the_run_folder_holds_settings_metrics_samples_plots_and_the_report(finished: tuple[Path, Measures]) -> None:
    folder, measures = finished
    run = RunFolder.open(folder)
    assert run.config()["learning_rate"] == 1e-3 and run.config()["kl_target"] == 6.0  # given, and the preset's
    assert [row["iteration"] for row in run.metrics()] == [1, 2, 3]
    assert means(run.evaluation()) == pytest.approx(means(measures), nan_ok=True)
    samples = run.samples()
    assert len(samples) == 8 and len({sample.prompt for sample in samples}) == 8
    assert {"score", "vader", "classifier", "kl"} == set(samples[0].after_scores)
    assert sum(s.after_scores["score"] for s in samples) / 8 == pytest.approx(measures["after"]["score"][0])
    assert {"reward.png", "kl.png", "frontier.png"} <= {path.name for path in (folder / "plots").iterdir()}
    page = (folder / "report.html").read_text()
    assert "PPO on" in page and samples[0].prompt in page and "data:image/png;base64," in page
    assert (folder / "README.md").read_text().startswith("---")


def test_before_training_policy_and_reference_are_one(finished: tuple[Path, Measures]) -> None:
    """KL and value are 0 exactly, so the first rewards are the scores; afterwards the policy has moved."""
    folder, measures = finished
    assert measures["before"]["kl"] == (0.0, 0.0)
    assert measures["after"]["kl"][0] != 0.0
    first = RunFolder.open(folder).metrics()[0]
    assert first["objective/kl"] == 0.0 and first["ppo/mean_non_score_reward"] == 0.0
    assert first["ppo/learning_rate"] == 1e-3
    assert all(math.isfinite(measures[when]["perplexity"][0]) for when in ("before", "after"))


def test_the_model_loads_as_a_wrapper_and_as_a_plain_language_model(finished: tuple[Path, Measures]) -> None:
    folder, _ = finished
    plain = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(str(folder / "model")).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer("The movie was", return_tensors="pt").input_ids
    with torch.no_grad():
        logits, _, values = wrapped(input_ids=ids)
        assert torch.equal(plain(input_ids=ids).logits, logits)
    assert values.abs().max() > 0  # the head began at 0 and was saved with what it learned


def test_tensorboard_has_the_metrics_of_every_iteration(finished: tuple[Path, Measures]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = finished
    events = EventAccumulator(str(folder / "ppo_gpt2_sentiment"))
    events.Reload()
    kl = events.Scalars("objective/kl")
    assert [event.step for event in kl] == [1, 2, 3]
    written = RunFolder.open(folder).series("objective/kl")[1]
    assert [event.value for event in kl] == pytest.approx(written, rel=1e-6)


def test_the_last_responses_are_written_token_by_token(world: Path, finished: tuple[Path, Measures]) -> None:
    folder, _ = finished
    run = RunFolder.open(folder)
    traces = run.tokens()
    assert len(traces) == 6 and {trace.iteration for trace in traces} == {3}
    assert all(1 <= len(trace.tokens) <= 6 and max(trace.logprobs) <= 0.0 for trace in traces)
    reward, _ = rewards.reward_source(
        str(world / "reward_model"), split_reviews(load_reviews(str(world / "reviews.csv")))
    )
    complete = [trace for trace in traces if "<eos>" not in trace.tokens and "�" not in "".join(trace.tokens)]
    again = reward([trace.prompt for trace in complete], ["".join(trace.tokens) for trace in complete])
    assert [trace.score for trace in complete] == pytest.approx(again, abs=1e-4)
    assert "Log-probability" in (folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_a_second_run_reuses_the_finished_one_wherever_it_was_moved(
    world: Path, finished: tuple[Path, Measures], tmp_path: Path
) -> None:
    """No iteration is run again; the same weights answer the same prompts with the same draws."""
    folder, measures = finished
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    metrics, tokens = ((moved / name).read_bytes() for name in ("metrics.jsonl", "tokens.jsonl"))
    again = recipe.main(settings(world, moved))
    assert means(again) == pytest.approx(means(measures), nan_ok=True)
    assert (moved / "metrics.jsonl").read_bytes() == metrics and (moved / "tokens.jsonl").read_bytes() == tokens


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_changed_settings_are_refused_by_name_and_fresh_begins_again(
    world: Path, finished: tuple[Path, Measures], tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(finished[0], tmp_path / "moved"))
    with pytest.raises(ValueError, match=r"seed=0 \(now 1\): choose another --output-dir, or --fresh"):
        recipe.main(settings(world, moved, seed=1))
    assert RunFolder.open(moved).config()["seed"] == 0
    recipe.main(settings(world, moved, seed=1, iterations=2, fresh=True))
    assert [row["iteration"] for row in untimed(moved)] == [1, 2]
    assert {trace.iteration for trace in RunFolder.open(moved).tokens()} == {2}
    assert untimed(moved)[0] != untimed(finished[0])[0]


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_an_interrupted_run_goes_on_to_the_very_end_it_would_have_had(
    world: Path,
    finished: tuple[Path, Measures],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ctrl-C in the second rollout drops it: a checkpoint, a sentence; the same command ends like the whole run."""
    folder, measures = finished
    known = rewards.reward_source

    def interrupting(choice: str, parts: Any) -> tuple[Callable[..., list[float]], str]:
        reward, line = known(choice, parts)
        calls = iter(range(100))

        def source(prompts: Sequence[str], responses: Sequence[str], **columns: Any) -> list[float]:
            if next(calls) == 9:  # eight pieces of the evaluation, first iteration, second iteration
                os.kill(os.getpid(), signal.SIGINT)
            return reward(prompts, responses, **columns)

        return source, line

    with monkeypatch.context() as patch:
        patch.setattr("sentiment.rewards.reward_source", interrupting)
        with pytest.raises(SystemExit) as stop:
            recipe.main(settings(world, tmp_path / "run"))
    assert stop.value.code == EXIT_RESUMABLE
    assert "Stopped by SIGINT after 1 of 3 iterations, checkpoint written" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint-1" / "manifest.json").is_file()
    resumed = recipe.main(settings(world, tmp_path / "run"))
    assert means(resumed) == pytest.approx(means(measures), nan_ok=True, abs=1e-6)
    assert json.dumps(untimed(tmp_path / "run")) == json.dumps(untimed(folder))


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_adapters_in_bfloat16_train_save_and_load(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The reference is the policy with its adapters off; critic and reward model are adapters on the same base."""
    model = save_llama(tmp_path / "llama")
    reward_model = save_reward_model(tmp_path / "reward", model, lora_rank=2, merge_adapter=False)
    AcceleratorState._reset_state()
    output = tmp_path / "run"
    shared: dict[str, Any] = {"critic": "adapter", "reward_model": str(reward_model), "reward_on_base": True}
    measures = recipe.main(
        settings(world, output, model=str(model), lora_rank=4, bfloat16=True, iterations=2, **shared)
    )
    said = capsys.readouterr().out
    assert f"adapter of {reward_model} on the policy's base" in said and " parameters are trained (" in said
    assert f"python -m rlhf_ppo.merge {output}/model {output}/model-merged" in said
    assert measures["before"]["kl"] == (0.0, 0.0) and measures["after"]["kl"][0] != 0.0
    assert (output / "model" / "adapter_model.safetensors").is_file()
    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(str(output / "model"))
    assert isinstance(wrapped.pretrained_model, PeftModel)
    assert AutoModelForCausalLM.from_pretrained(output / "model").config.model_type == "llama"


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_a_guards_line_given_by_a_flag_ends_training_and_is_said(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training stops, its model is still evaluated and saved; the judges of the recipe are those of the guard."""
    flags = "--guards.kl.limit 1e-9 --guards.judge.limit 9 --guards.judge.action keep_best --guards.judge-name vader"
    monkeypatch.setattr("sys.argv", ["recipe", *flags.split(), "--eval-every", "1"])
    given = command_line.parse(recipe.Config, None)
    output = tmp_path / "run"
    # The KL is estimated from draws, so the first may be below 0: other processors draw otherwise.
    recipe.main(settings(world, output, guards=given.guards, eval_every=given.eval_every, iterations=30))
    rows = RunFolder.open(output).metrics()
    assert [row["objective/kl"] > 1e-9 for row in rows] == [*[False] * (len(rows) - 1), True]
    assert f"{len(rows)} iterations, ended by KL budget: " in capsys.readouterr().out
    assert all("guard/judge_lead" in row for row in rows)
    assert (output / "model").is_dir()


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_the_classic_pair_runs_by_naming_it(world: Path, tmp_path: Path) -> None:
    """A GPT-2 without a padding token and a DistilBERT that tells NEGATIVE from POSITIVE, as on the hub."""
    model, classifier = save_classic_policy(tmp_path / "gpt2-imdb"), save_classic_classifier(tmp_path / "distilbert")
    measures = recipe.main(
        settings(world, tmp_path / "run", model=str(model), reward_model=str(classifier), iterations=1)
    )
    assert measures["before"]["kl"] == (0.0, 0.0)
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved.pad_token == saved.eos_token


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_the_reward_model_is_trained_once_and_then_taken_from_the_cache(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_PPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(rewards, "fetch", lambda asset: world / "gpt2")
    recipe.main(settings(world, tmp_path / "run", reward_model="train", iterations=1))
    (folder,) = (tmp_path / "cache" / "models").glob("sentiment-reward-model-*")
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    parts = split_reviews(load_reviews(str(world / "reviews.csv")))
    _, line = rewards.reward_source("train", parts)
    assert line.startswith("held-out pair accuracy ")
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights
