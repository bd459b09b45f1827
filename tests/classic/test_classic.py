"""The surface that scripts for TRL's classic `PPOTrainer` use: construction, pieces, `step()`, logging, saving."""

import math
from pathlib import Path
from typing import Any

import datasets
import jaxtyping
import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_ppo import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    core,
    respond_to_batch,
    set_seed,
)
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_gpt2, tiny_t5, tiny_tokenizer

QUERIES = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
RESPONSES = [torch.tensor([10, 11]), torch.tensor([12, 13, 14, EOS_TOKEN_ID])]
SCORES = [torch.tensor(1.0), torch.tensor(-1.0)]


@pytest.fixture
def as_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the type checks that tests run with: what a wrong argument meets is our own message."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def policy(**settings: Any) -> AutoModelForCausalLMWithValueHead:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(**settings))


def sequence_to_sequence() -> AutoModelForSeq2SeqLMWithValueHead:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForSeq2SeqLMWithValueHead.from_pretrained(tiny_t5())


def trainer_of(model: Any = None, *, padding_side: str = "left", **settings: Any) -> PPOTrainer:
    """A trainer without dataset; `arguments` go to it, everything else to its config."""
    arguments = settings.pop("arguments", {})
    defaults: dict[str, Any] = {"batch_size": 2, "mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 1e-3}
    defaults["diagnose"] = False  # the tokens of these tests were not drawn from the policy
    return PPOTrainer(
        PPOConfig(**defaults | settings),
        policy() if model is None else model,
        tokenizer=tiny_tokenizer(padding_side=padding_side),
        **arguments,
    )


def weights(trainer: PPOTrainer) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.mark.usefixtures("as_a_user")
def test_arguments_of_the_wrong_kind_are_named() -> None:
    model, tokenizer, config = policy(), tiny_tokenizer(), PPOConfig(batch_size=2, mini_batch_size=2)
    plain: Any = tiny_gpt2()
    with pytest.raises(ValueError, match="config must be a PPOConfig, got <class 'dict'>"):
        PPOTrainer({}, model, None, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokenizer must be a PreTrainedTokenizerBase"):
        PPOTrainer(config, model, None, "gpt2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model must be a PreTrainedModelWrapper, got .*GPT2LMHeadModel"):
        PPOTrainer(config, plain, None, tokenizer)
    with pytest.raises(ValueError, match="ref_model must be a PreTrainedModelWrapper or `None`"):
        PPOTrainer(config, model, plain, tokenizer)
    with pytest.raises(ValueError, match="reference would move with the policy"):
        PPOTrainer(config, model, model, tokenizer)
    with pytest.raises(ValueError, match=r"dataset must be a torch\.utils\.data\.Dataset or datasets\.Dataset"):
        PPOTrainer(config, model, None, tokenizer, dataset=[1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"lr_scheduler must be a torch\.optim\.lr_scheduler"):
        PPOTrainer(config, model, None, tokenizer, lr_scheduler="cosine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="You have to specify repo_id"):
        PPOTrainer(PPOConfig(push_to_hub_if_best_kwargs={"private": True}), model, None, tokenizer)


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"inexact division: 2 / 4 = 0\.5"):
        PPOConfig(batch_size=2, mini_batch_size=2, gradient_accumulation_steps=2)


def test_a_misspelt_setting_is_an_error() -> None:
    config = PPOConfig(batch_size=2, mini_batch_size=2)
    with pytest.raises(AttributeError, match="no setting 'ppo_epoch'"):
        config.ppo_epoch = 3  # type: ignore[attr-defined]


def test_shared_layers_beside_a_reference_are_ignored_with_a_warning() -> None:
    """Six of two layers: the number is not looked at."""
    with pytest.warns(UserWarning, match="num_shared_layers is ignored"):
        trainer_of(arguments={"ref_model": policy(), "num_shared_layers": 6})


def test_the_config_is_read_at_each_step() -> None:
    """Scripts change settings between steps; sizes, epochs, penalty and thresholds follow at once."""
    trainer = trainer_of()
    trainer.config.kl_penalty, trainer.config.ppo_epochs, trainer.config.mini_batch_size = "mse", 3, 1
    trainer.config.gradient_accumulation_steps = 1
    statistics = trainer.step(QUERIES, RESPONSES, SCORES)
    assert trainer.metrics["ppo/updates"] == 6
    assert float(statistics["objective/kl"]) >= 0


def test_one_query_gives_a_row_and_a_list_gives_a_list() -> None:
    trainer = trainer_of()
    settings = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": -1}
    batched = trainer.generate(QUERIES, batch_size=2, **settings)
    for query, response in zip(QUERIES, batched, strict=True):
        row = trainer.generate(query, **settings)
        assert row.shape == (1, len(query) + 4)
        assert torch.equal(row[0], response)
        assert torch.equal(trainer.generate(query, return_prompt=False, **settings)[0], response[len(query) :])
    with pytest.raises(ValueError, match="list of tensors of shape"):
        trainer.generate(torch.ones(2, 3, dtype=torch.long), **settings)


def test_the_length_sampler_sets_lengths() -> None:
    responses = trainer_of().generate(
        QUERIES, length_sampler=LengthSampler(3, 4), return_prompt=False, do_sample=True, top_k=0.0, eos_token_id=-1
    )
    assert [len(response) for response in responses] == [3, 3]


def test_the_reference_answers_too_when_asked() -> None:
    """A reference with negated embeddings disagrees; that of a LoRA policy is the policy with its adapters off."""
    reference = policy()
    head = reference.pretrained_model.lm_head.weight
    head.data = -head.data
    trainer = trainer_of(arguments={"ref_model": reference})
    settings = {"do_sample": False, "max_new_tokens": 4, "generate_ref_response": True}
    own, other = trainer.generate(QUERIES, **settings)
    assert not all(torch.equal(a, b) for a, b in zip(own, other, strict=True))
    row, other_row = trainer.generate(QUERIES[0], **settings)
    assert torch.equal(row[0], own[0])
    assert torch.equal(other_row[0], other[0])

    adapted = AutoModelForCausalLMWithValueHead.from_pretrained(
        tiny_gpt2(), peft_config=LoraConfig(task_type="CAUSAL_LM", r=4, fan_in_fan_out=True)
    )
    lora = trainer_of(adapted)
    assert lora.ref_model is None
    before = lora.generate(QUERIES, **settings)[1]
    for name, parameter in lora.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    own, other = lora.generate(QUERIES, **settings)
    assert all(torch.equal(a, b) for a, b in zip(other, before, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.ones(2, 3)}, "queries must be a list of tensors - got <class 'torch.Tensor'>"),
        (
            {"responses": [RESPONSES[0], [1, 2]]},
            r"Elements in responses must be tensors - got <class 'list'>",
        ),
        ({"scores": SCORES[:1]}, r"Batch size \(2\) does not match number of examples - but got 1 for: scores"),
        ({"scores": [torch.tensor([[1.0]]), SCORES[1]]}, "Scores must be 1-dimensional - got 2"),
        (
            {"scores": [SCORES[0], torch.tensor([1.0, 2.0])]},
            r"scores\[1\] must be one number, or one for each of",
        ),
        ({"queries": [QUERIES[0], torch.tensor([8.0])]}, r"queries\[1\] must be a 1-D tensor of token ids"),
        ({"queries": [QUERIES[0], torch.tensor([999])]}, r"queries\[1\] holds token ids from 999 to 999"),
        ({"responses": [RESPONSES[0], torch.ones(127, dtype=torch.long)]}, "sample 1 has 129 tokens"),
        ({"response_masks": [torch.ones(2), torch.full((4,), 0.5)]}, r"response_masks\[1\] must hold zeros and ones"),
    ],
)
def test_a_wrong_batch_is_refused_by_name_before_anything_changes(change: dict[str, Any], message: str) -> None:
    trainer = trainer_of()
    before = weights(trainer)
    batch = {"queries": QUERIES, "responses": RESPONSES, "scores": SCORES, **change}
    with pytest.raises(ValueError, match=message):
        trainer.step(**batch)
    assert torch.equal(weights(trainer), before)


def test_scores_may_be_integers_vectors_of_one_and_numbers_of_double_precision() -> None:
    """All forms of the same numbers give the same step."""
    forms: list[list[Tensor]] = [
        SCORES,
        [torch.tensor(1), torch.tensor(-1)],
        [torch.tensor([1.0]), torch.tensor([-1.0])],
        [torch.tensor(1.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float16)],
        [torch.tensor([0.0, 1.0]), torch.tensor([0.0, 0.0, 0.0, -1.0])],
    ]
    results = []
    for scores in forms:
        trainer = trainer_of()
        trainer.step(QUERIES, RESPONSES, scores)
        results.append(weights(trainer))
    assert all(torch.equal(result, results[0]) for result in results)


def test_per_token_scores_are_earned_where_they_stand() -> None:
    """With γ = λ = 1 and no KL, the value target of an action is the sum of the scores from it on."""
    trainer = trainer_of(lam=1.0, init_kl_coef=0.0, adap_kl_ctrl=False)
    scores = [torch.tensor([3.0, -1.0]), torch.tensor([0.5, 0.0, 0.0, 2.0])]
    statistics = trainer.step(QUERIES, RESPONSES, scores)
    targets = [2.0, -1.0, 2.5, 2.0, 2.0, 2.0]
    assert math.isclose(float(statistics["ppo/returns/mean"]), sum(targets) / 6, rel_tol=1e-4)
    assert math.isclose(float(statistics["ppo/mean_scores"]), (2.0 + 2.5) / 2, rel_tol=1e-5)


def test_the_dataloader_drops_the_incomplete_batch_and_unused_columns() -> None:
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[5, 6], [7], [8, 9]], "query": ["a", "b", "c"], "rating": [1, 2, 3]}
    ).with_format("torch")

    def columns_of(data: list[dict[str, Any]]) -> dict[str, list[Any]]:
        return {name: [row[name] for row in data] for name in data[0]}

    config = PPOConfig(batch_size=2, mini_batch_size=2)
    trainer = PPOTrainer(config, policy(), None, tiny_tokenizer(), rows, None, columns_of)
    assert trainer.dataloader is not None
    batches = list(trainer.dataloader)
    assert len(batches) == 1
    assert set(batches[0]) == {"input_ids", "query"}
    assert all(ids.dim() == 1 for ids in batches[0]["input_ids"])
    kept = PPOConfig(batch_size=2, mini_batch_size=2, remove_unused_columns=False)
    trainer = PPOTrainer(kept, policy(), None, tiny_tokenizer(), rows, None, columns_of)
    assert trainer.dataloader is not None
    assert set(next(iter(trainer.dataloader))) == {"input_ids", "query", "rating"}


def test_log_stats_writes_to_the_tracker(tmp_path: Path) -> None:
    trainer = trainer_of(log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path)})
    statistics = trainer.step(QUERIES, RESPONSES, SCORES)
    trainer.log_stats(statistics, {"query": ["a", "b"], "response": ["c", "d"]}, SCORES)
    assert trainer.current_step == 1
    trainer.accelerator.end_training()
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_log_stats_warns_of_a_batch_without_texts() -> None:
    trainer = trainer_of()
    with pytest.warns(UserWarning, match="game logs will not be logged"):
        trainer.log_stats({}, {"input_ids": []}, torch.tensor([1.0, 2.0]))


def test_a_saved_policy_loads_plain_and_with_its_value_head(tmp_path: Path) -> None:
    trainer = trainer_of()
    trainer.step(QUERIES, RESPONSES, SCORES)
    trainer.save_pretrained(tmp_path)
    assert {"config.json", "tokenizer.json", "README.md"} <= {path.name for path in tmp_path.iterdir()}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    inputs = torch.cat([QUERIES[0], RESPONSES[0]])[None]
    trainer.model.eval()
    logits, _, values = trainer.model(inputs)
    # The trainer's layers may multiply by another library than freshly loaded ones.
    assert torch.allclose(plain(inputs).logits, logits, atol=1e-5)
    assert torch.allclose(again.eval()(inputs)[2], values, atol=1e-5)


@pytest.mark.filterwarnings("ignore:KL divergence is starting to become negative")  # responses are given
def test_the_best_policy_so_far_is_pushed_before_it_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores are those of the policy that sampled; every second step is compared."""
    trainer = trainer_of(push_to_hub_if_best_kwargs={"repo_id": "somebody/best"}, compare_steps=2)
    pushed = []
    monkeypatch.setattr(PPOTrainer, "push_to_hub", lambda self, repo_id: pushed.append((repo_id, weights(self))))
    first = weights(trainer)
    for score in (1.0, 5.0, 0.5, 9.0, 2.0):
        trainer.step(QUERIES, RESPONSES, [torch.tensor(score)] * 2)
    assert [name for name, _ in pushed] == ["somebody/best"] * 2  # scores 1.0 and 2.0
    assert torch.equal(pushed[0][1], first)


def test_the_optimizer_and_scheduler_of_the_caller_are_used() -> None:
    model = policy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    trainer = trainer_of(model, arguments={"optimizer": optimizer, "lr_scheduler": scheduler})
    assert trainer.step(QUERIES, RESPONSES, SCORES)["ppo/learning_rate"] == 0.01
    assert math.isclose(float(trainer.step(QUERIES, RESPONSES, SCORES)["ppo/learning_rate"]), 0.009)


def test_the_pieces_give_the_numbers_of_step() -> None:
    """Forward pass, rewards, advantages and loss chained by hand repeat what a step of one epoch reports."""
    trainer = trainer_of(ppo_epochs=1, kl_penalty="mse", arguments={"ref_model": policy(seed=1)})
    inputs = trainer.prepare_model_inputs(QUERIES, RESPONSES)
    with torch.no_grad():
        logprobs, logits, values, mask = trainer.batched_forward_pass(
            trainer.model, QUERIES, RESPONSES, inputs, return_logits=True
        )
        reference, _, _, _ = trainer.batched_forward_pass(trainer.ref_model, QUERIES, RESPONSES, inputs)
    assert logits is not None
    rewards, _, kl = trainer.compute_rewards(torch.stack(SCORES), logprobs, reference, mask)
    old_values, advantages, returns = trainer.compute_advantages(values, rewards, mask)
    _, value, details = trainer.loss(logprobs, old_values, logits, values, logprobs, mask, advantages, returns)
    statistics = trainer.step(QUERIES, RESPONSES, SCORES)
    expected = {f"ppo/{name}": float(item) for name, item in details.items() if item.dim() == 0}
    expected |= {"objective/kl": float((kl * mask).sum(1).mean()), "objective/kl_coef": 0.2}
    for name, number in expected.items():
        assert math.isclose(float(statistics[name]), number, rel_tol=1e-4, abs_tol=1e-5), name
    assert math.isclose(float(value), 0.1 * float(statistics["ppo/loss/value"]), rel_tol=1e-5)


def test_train_minibatch_moves_the_policy() -> None:
    trainer = trainer_of()
    inputs = trainer.prepare_model_inputs(QUERIES, RESPONSES)
    logprobs, logits, values, mask = trainer.batched_forward_pass(
        trainer.model, QUERIES, RESPONSES, inputs, return_logits=True
    )
    assert logits is not None
    before, old = weights(trainer), logprobs.detach()
    noise = torch.randn(mask.shape)
    statistics = trainer.train_minibatch(
        old, values.detach(), logprobs, logits, values, mask, noise, values.detach() + noise
    )
    assert not torch.equal(weights(trainer), before)
    assert math.isclose(float(statistics["policy/approxkl"]), 0.0, abs_tol=1e-9)


def test_an_encoder_decoder_is_scored_as_its_own_forward_does() -> None:
    """The start token that `generate` leads with is no action; every token after it is, the first one too."""
    model = sequence_to_sequence()
    trainer = trainer_of(model)
    generated = trainer.generate(QUERIES, do_sample=False, max_new_tokens=5)
    assert all(int(response[0]) == 0 for response in generated)
    responses = [torch.cat([torch.tensor([0]), response]) for response in RESPONSES]
    with torch.no_grad():
        out, _, _ = model(input_ids=QUERIES[0][None], decoder_input_ids=responses[0][None])
    expected = out[0, :-1].log_softmax(-1).gather(1, responses[0][1:, None]).squeeze(1)
    statistics = trainer.step(QUERIES, responses, SCORES)
    assert np.allclose(statistics["objective/logprobs"][0, : len(expected)], expected, atol=1e-5)  # type: ignore[index]
    bare = trainer_of(sequence_to_sequence())
    again = bare.step(QUERIES, RESPONSES, SCORES)
    assert again["ppo/returns/mean"] == statistics["ppo/returns/mean"]
    with pytest.raises(ValueError, match=r"responses\[1\] is empty"):
        bare.step(QUERIES, [responses[0], torch.tensor([0])], SCORES)


def test_helpers_are_found_where_the_classic_kept_them() -> None:
    assert (core.LengthSampler, core.respond_to_batch, core.set_seed) == (LengthSampler, respond_to_batch, set_seed)
