"""A critic beside the policy: it starts as the reward model, and its loss pulls at no weight of the policy."""

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from rlhf_ppo import (
    AutoModelForCausalLMWithValueHead,
    Critic,
    PPOClip,
    PPOConfig,
    PPOTrainer,
    SeparateCritic,
    attach_critic,
)
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.rollout.experience import Responses
from tests.support.tiny_models import tiny_gpt2, tiny_tokenizer

VOCAB = 320


def classifier(*, vocab_size: int = VOCAB, labels: int = 1) -> GPT2ForSequenceClassification:
    config = GPT2Config(
        vocab_size=vocab_size, n_layer=1, n_embd=16, n_head=2, n_positions=64, num_labels=labels, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return GPT2ForSequenceClassification(config).eval()


def policy() -> AutoModelForCausalLMWithValueHead:
    return AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())


def inputs() -> TokenInputs:
    return TokenInputs(
        prompts=[torch.tensor([5, 6]), torch.tensor([7])], responses=[torch.tensor([8, 9, 10]), torch.tensor([11])]
    )


def trainer(**critic: int) -> PPOTrainer:
    model = policy()
    attach_critic(model, SeparateCritic.from_reward_model(classifier(), gain=2.0, bias=-1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PPOTrainer(
            PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=2, learning_rate=1e-3), model,
            tokenizer=tiny_tokenizer(), algorithm=PPOClip(critic=Critic(**critic)),
        )  # fmt: skip


def batch(own: PPOTrainer) -> Responses:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    return Responses(inputs=inputs(), mask=mask, scores=torch.tensor([1.0, -1.0]))


def test_the_value_of_a_whole_response_is_its_normalized_score() -> None:
    model, rewards = policy(), classifier()
    attach_critic(model, SeparateCritic.from_reward_model(rewards, gain=2.0, bias=-1.0))
    values = model.critic(inputs())  # type: ignore[misc]
    for row, (prompt, response) in enumerate(zip(inputs().prompts, inputs().responses, strict=True)):
        with torch.no_grad():
            raw = rewards(torch.cat([prompt, response])[None]).logits[0, 0]
        assert len(values[row]) == len(response) + 1
        assert_close(values[row][-1], 2.0 * raw - 1.0)


def test_policy_and_critic_learn_and_the_value_head_on_the_trunk_stays() -> None:
    own = trainer()
    before = {name: parameter.clone() for name, parameter in own.model.named_parameters()}
    assert own.ref_model is not None and own.ref_model.critic is None
    own.learn(batch(own))
    moved = {name for name, parameter in own.model.named_parameters() if not torch.equal(before[name], parameter)}
    assert any(name.startswith("critic.backbone.") for name in moved) and "critic.head.weight" in moved
    assert any(name.startswith("pretrained_model.") for name in moved)
    assert not any(name.startswith("v_head.") for name in moved)


def test_the_value_loss_reaches_no_weight_of_the_policy() -> None:
    own = trainer()
    values = own.policy(inputs()).values
    trunk = list(own.model.pretrained_model.parameters())
    gradients = torch.autograd.grad(values.sum(), [*trunk, *own.model.critic.parameters()], allow_unused=True)  # type: ignore[union-attr]
    assert all(gradient is None for gradient in gradients[: len(trunk)])
    assert any(gradient is not None for gradient in gradients[len(trunk) :])


def test_a_separate_critic_warms_up_with_all_its_weights() -> None:
    own = trainer(warmup_iterations=2)
    trunk = [parameter.clone() for parameter in own.model.pretrained_model.parameters()]
    critic = [parameter.clone() for parameter in own.model.critic.parameters()]  # type: ignore[union-attr]
    own.learn(batch(own))
    assert all(torch.equal(a, b) for a, b in zip(trunk, own.model.pretrained_model.parameters(), strict=True))
    moved = [not torch.equal(a, b) for a, b in zip(critic, own.model.critic.parameters(), strict=True)]  # type: ignore[union-attr]
    assert sum(moved) > len(moved) // 2


def test_a_critic_from_the_policys_trunk_begins_at_zero() -> None:
    model = policy()
    attach_critic(model, SeparateCritic.from_policy(model))
    assert all((row == 0).all() for row in model.critic(inputs()))  # type: ignore[misc]


def test_dropout_inside_attention_is_off_in_training_too() -> None:
    """It is no module, but a number that the attention reads."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        attention_dropout=0.9, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    model = policy()
    attach_critic(model, SeparateCritic.from_reward_model(LlamaForSequenceClassification(config)))
    assert model.critic is not None
    first, second = (torch.cat(list(model.critic.train()(inputs()))) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)


def test_a_frozen_reward_model_becomes_a_critic_that_learns() -> None:
    frozen = classifier().requires_grad_(False)
    critic = SeparateCritic.from_reward_model(frozen)
    assert all(parameter.requires_grad for parameter in critic.parameters())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_reward_model_with_an_adapter_becomes_a_critic_with_its_scores() -> None:
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], init_lora_weights=False)
    adapted: Any = get_peft_model(classifier(), lora).eval()
    critic = SeparateCritic.from_reward_model(adapted)
    assert isinstance(adapted, PeftModel) and all(parameter.requires_grad for parameter in critic.parameters())
    rows = [torch.cat(pair) for pair in zip(inputs().prompts, inputs().responses, strict=True)]
    scores = torch.cat([adapted(input_ids=row[None]).logits.flatten() for row in rows])
    assert_close(torch.stack([values[-1] for values in critic(inputs())]), scores)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:Model has `tie_word", "ignore:Input and output embeddings")
@pytest.mark.parametrize("settings", [{"trainable_token_indices": [5, 6]}, {"target_modules": ["c_attn", "wte"]}])
def test_a_policy_with_adapted_embeddings_takes_a_separate_critic(settings: dict[str, Any]) -> None:
    config = LoraConfig(**{"r": 2, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM", **settings})
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(), peft_config=config)
    attach_critic(model, SeparateCritic.from_policy(model))
    settings = {"batch_size": 2, "mini_batch_size": 2, "learning_rate": 1e-2, "diagnose": False}
    trainer = PPOTrainer(PPOConfig(**settings), model, tokenizer=tiny_tokenizer())
    trainer.step(inputs().prompts, inputs().responses, [torch.tensor(1.0), torch.tensor(0.0)])
    assert any(bool(values.any()) for values in model.critic(inputs()))  # type: ignore[misc]
    smaller = SeparateCritic.from_reward_model(classifier(vocab_size=VOCAB - 1))
    with pytest.raises(ValueError, match=f"the critic has {VOCAB - 1} token embeddings, the policy {VOCAB}"):
        attach_critic(model, smaller)


def test_a_quantized_reward_model_is_refused() -> None:
    quantized: Any = classifier()
    quantized.is_loaded_in_4bit = True
    with pytest.raises(ValueError, match="in 4 or 8 bits: a copy of such weights cannot be trained"):
        SeparateCritic.from_reward_model(quantized)


def test_encoders_several_labels_and_foreign_tokenizers_are_refused() -> None:
    encoder = BertForSequenceClassification(
        BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    for wrong in (encoder, classifier(labels=2)):
        with pytest.raises(ValueError, match="one label and a head `score`"):
            SeparateCritic.from_reward_model(wrong)
    with pytest.raises(ValueError, match="do not share a tokenizer"):
        attach_critic(policy(), SeparateCritic.from_reward_model(classifier(vocab_size=100)))
