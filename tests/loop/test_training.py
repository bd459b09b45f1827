"""The managed loop: it learns, resumes exactly, stops when asked, and keeps the best model."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ppo import (
    GRPO,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    TrainConfig,
    TrainState,
)
from rlhf_ppo.loop.run_folder import RunFolder
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.transformers_generate import TransformersGenerate
from tests.support.tiny_models import tiny_gpt2, tiny_t5, tiny_tokenizer
from tests.support.tiny_run import SAMPLING, TEXTS, config, parameters, share_of_e, trainer


def test_ppo_raises_the_reward_of_a_tiny_policy() -> None:
    """One token decides the reward, so twenty iterations must multiply it."""
    own = trainer(batch_size=32, mini_batch_size=16, learning_rate=3e-3, init_kl_coef=0.001, ppo_epochs=4)

    def likes_token_five(prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float]:
        return [float(response.count("e")) for response in responses]

    history = own.train(likes_token_five, config(iterations=20)).history
    first, last = (sum(row["env/reward_mean"] for row in part) / 5 for part in (history[:5], history[-5:]))
    assert last > 2 * first


@pytest.mark.slow
def test_an_encoder_decoder_learns_in_the_managed_loop() -> None:
    """The encoder reads the prompt; `generate` draws, since the decode loop is for causal models."""
    tokenizer = tiny_tokenizer()
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_t5())
    settings = PPOConfig(batch_size=32, mini_batch_size=16, learning_rate=1e-2, init_kl_coef=0.001, ppo_epochs=4)
    own = PPOTrainer(settings, model, None, tokenizer, PromptDataset.from_texts(TEXTS, tokenizer))

    def counts_e(prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float]:
        return [float(response.count("e")) for response in responses]

    history = own.train(counts_e, config(iterations=8), sampler=TransformersGenerate()).history
    assert abs(history[0]["objective/kl"]) < 1e-4
    first, last = (sum(row["env/reward_mean"] for row in part) / 2 for part in (history[:2], history[-2:]))
    assert last > 2 * first


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    """Weights, metrics and samples depend on every random stream, on Adam's moments and on the KL coefficient."""
    whole = trainer()
    expected = whole.train(share_of_e, config(iterations=5)).history
    first = trainer()
    first.train(share_of_e, config(tmp_path, iterations=5, save_every=1), callbacks=[lambda _, at: at.iteration == 2])
    second = trainer(seed=0)
    resumed = second.train(share_of_e, config(tmp_path, iterations=5, save_every=1))
    assert resumed.iteration == 5
    assert torch.equal(parameters(whole), parameters(second))
    untimed = [{name: value for name, value in row.items() if not name.startswith("time/")} for row in expected[2:]]
    for row, other in zip(untimed, resumed.history, strict=True):
        assert {name: other[name] for name in row} == row
    assert [row["iteration"] for row in RunFolder.open(tmp_path).metrics()] == [1, 2, 3, 4, 5]


def test_another_call_goes_on_in_the_prompts_and_the_random_numbers() -> None:
    """Two calls of one iteration draw what one call of two draws: four of eight prompts, and then the other four."""
    drawn: list[list[tuple[str, str]]] = []

    def records(prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float]:
        drawn.append(list(zip(prompts, responses, strict=True)))
        return share_of_e(prompts, responses)

    tokenizer = tiny_tokenizer()
    prompts = PromptDataset.from_texts([f"{text} {word}" for text in TEXTS for word in ("was", "is")], tokenizer)
    twice, once = (trainer(batch_size=4, mini_batch_size=4) for _ in range(2))
    for _ in range(2):
        twice.train(records, config(iterations=1), prompts=prompts)
        twice.evaluate(prompts, share_of_e, SAMPLING)  # draws numbers of its own
    once.train(records, config(iterations=2), prompts=prompts)
    assert drawn[:2] == drawn[2:]
    assert {prompt for prompt, _ in drawn[0]}.isdisjoint(prompt for prompt, _ in drawn[1])
    assert torch.equal(parameters(twice), parameters(once))


def test_memory_holds_the_metrics_of_the_last_iterations_and_the_run_folder_those_of_all(tmp_path: Path) -> None:
    """A list of every iteration would grow for as long as a run lasts."""
    state = trainer().train(share_of_e, config(tmp_path, iterations=4, keep_history=2))
    rows = RunFolder.open(tmp_path).metrics()
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    names = ("env/reward_mean", "time/iteration")
    assert [[row[name] for name in names] for row in state.history] == [
        [row[name] for name in names] for row in rows[2:]
    ]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    trainer().train(share_of_e, config(tmp_path, iterations=3, save_every=1))
    weights = tmp_path / "checkpoint-3" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.warns(UserWarning, match=r"checkpoint-3 cannot be used: model.safetensors has changed"):
        state = trainer().train(share_of_e, config(tmp_path, iterations=3, save_every=1))
    assert len(state.history) == 1


def test_a_checkpoint_of_another_model_is_refused_with_the_parameter_named(tmp_path: Path) -> None:
    trainer().train(share_of_e, config(tmp_path, iterations=1, save_every=1))
    other = trainer()
    wide = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=0, n_layer=1, n_embd=8, n_head=1))
    own = PPOTrainer(other.config, wide, tokenizer=other.tokenizer, dataset=other.dataset)
    with pytest.raises(ValueError, match="another model"):
        own.train(share_of_e, config(tmp_path, iterations=2, save_every=1))


def test_a_signal_ends_the_iteration_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    def interrupt(_: PPOTrainer, state: TrainState) -> None:
        if state.iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    state = trainer().train(share_of_e, config(tmp_path, iterations=9, save_every=9), callbacks=[interrupt])
    assert state.stopped == "SIGTERM"
    # The handler runs between two bytecodes, so the iteration after may have begun before the loop looks.
    assert state.iteration in (2, 3)
    assert (tmp_path / f"checkpoint-{state.iteration}" / "manifest.json").is_file()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_group_algorithms_refuse_one_response_a_prompt() -> None:
    with pytest.raises(ValueError, match="num_return_sequences"):
        trainer(algorithm=GRPO()).train(share_of_e, config())


def test_samples_that_a_source_skips_take_no_part() -> None:
    own = trainer()
    lengths: list[float] = []

    def skips_two(prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float | None]:
        return [None, None, *[1.0] * (len(responses) - 2)]

    own.train(skips_two, config(iterations=1), callbacks=[lambda at, _: lengths.append(at.metrics["work/head_rows"])])
    assert 0 < lengths[0] <= 6 * 6 * 3  # scored once, passed over twice, six responses of at most six tokens


def test_the_best_model_is_kept_by_its_held_out_score(tmp_path: Path) -> None:
    own = trainer()
    held_out = PromptDataset.from_texts(TEXTS, own.tokenizer)
    state = own.train(
        share_of_e, config(tmp_path, iterations=4, eval_every=2, keep_best="score"), eval_prompts=held_out
    )
    means = [row["eval/score"] for row in RunFolder.open(tmp_path).metrics() if "eval/score" in row]
    assert state.best == pytest.approx(max(means))
    assert AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "best")) is not None


def test_the_loop_stops_when_the_kl_budget_is_spent() -> None:
    state = trainer(learning_rate=0.05, init_kl_coef=0.0, adap_kl_ctrl=False).train(
        share_of_e, config(iterations=20, max_reference_kl=0.5)
    )
    assert state.stopped is not None
    assert state.stopped.startswith("KL budget")
    assert state.iteration < 20


def test_a_temperature_that_differs_between_sampling_and_scoring_is_refused() -> None:
    with pytest.raises(ValueError, match="probability ratios"):
        trainer().train(share_of_e, TrainConfig(sampling=SamplingConfig(max_new_tokens=4, temperature=0.7)))


def test_a_tokenizer_of_another_model_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=0, vocab_size=100))
    prompts = PromptDataset.from_texts(TEXTS, tokenizer)
    own = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=4), model, tokenizer=tokenizer, dataset=prompts)
    with pytest.raises(ValueError, match="do not belong together"):
        own.train(share_of_e, config())


def test_the_run_folder_of_the_trainers_config_is_used_where_the_loop_names_none(tmp_path: Path) -> None:
    own = trainer(output_dir=str(tmp_path / "of the trainer"))
    own.evaluate(own.dataset, share_of_e, SAMPLING)  # type: ignore[arg-type]
    assert not (tmp_path / "of the trainer").exists()
    own.train(share_of_e, config(tmp_path / "of the loop", iterations=1))
    assert [path.name for path in tmp_path.iterdir()] == ["of the loop"]
    own.train(share_of_e, config(iterations=1, save_every=1))
    assert (tmp_path / "of the trainer" / "checkpoint-1").is_dir()


def test_a_push_that_train_would_not_make_is_refused() -> None:
    own = trainer(push_to_hub_if_best_kwargs={"repo_id": "some/body"})
    with pytest.raises(ValueError, match="which only step\\(\\) reads"):
        own.train(share_of_e, config(iterations=1))
