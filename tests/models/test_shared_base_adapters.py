"""Policy, reference, critic and reward model on one base: each is an adapter, and none disturbs another."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from reward_model import RewardModel
from reward_model.models.contract import Contract, ContractError, Normalization, TextRule, tokenizer_sha256
from reward_model.models.on_policy import reward_on_policy
from rlhf_ppo import AutoModelForCausalLMWithValueHead, Critic, PPOClip, PPOConfig, PPOTrainer
from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.models.adapters import active_adapter, adapter_parameters, describe_trainable_parameters
from rlhf_ppo.models.shared_base_adapters import CRITIC_ADAPTER, attach_critic_adapter, attach_reward_adapter
from rlhf_ppo.rollout.prompts import PromptDataset
from tests.support.tiny_models import tiny_llama, tiny_tokenizer
from tests.support.tiny_run import TEXTS, config, share_of_e

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

WIDTH = 48
"""Of the base's hidden state: no other test has a matrix of this shape."""
INPUTS = TokenInputs(
    prompts=[torch.tensor([5, 6]), torch.tensor([7])], responses=[torch.tensor([8, 9, 10]), torch.tensor([11])]
)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=WIDTH).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward_folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train_reward_model(merge_adapter=False)` writes, with an adapter that is far from 0."""
    folder, tokenizer = tmp_path_factory.mktemp("reward"), tiny_tokenizer(padding_side="right")
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = get_peft_model(classifier, lora(task_type="SEQ_CLS", modules_to_save=["score"]))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "score" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    Contract(
        head="score.weight", base=str(base), tokenizer_sha256=tokenizer_sha256(tokenizer),
        text=TextRule(max_length=64), normalization=Normalization(gain=2.0, bias=-1.0),
    ).write(folder)  # fmt: skip
    return folder


def policy(base: Path, **settings: Any) -> AutoModelForCausalLMWithValueHead:
    torch.manual_seed(1)
    return AutoModelForCausalLMWithValueHead.from_pretrained(str(base), peft_config=lora(**settings)).eval()


def copies_of_the_base() -> int:
    """Embedding tables of the base that are alive in this process."""
    gc.collect()
    tables = [item for item in gc.get_objects() if type(item) is nn.Parameter and item.shape == (320, WIDTH)]
    return len({table.data_ptr() for table in tables}) // 2  # input and output embeddings


def test_scores_are_those_of_the_reward_model_by_itself_before_and_after_the_policy_has_learned(
    base: Path, reward_folder: Path
) -> None:
    alone = RewardModel.from_pretrained(reward_folder)
    prompts, responses = ["The movie", "I", "What a story"], [" was good.", " did not like the plot at all", ""]
    expected = alone(prompts, responses)
    model = policy(base)
    shared = reward_on_policy(model, reward_folder)
    assert_close(shared(prompts, responses), expected, atol=1e-6, rtol=1e-6)
    assert max(expected) - min(expected) > 0.1
    trainer = PPOTrainer(
        PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=1, learning_rate=0.01), model,
        tokenizer=tiny_tokenizer(), dataset=PromptDataset.from_texts(TEXTS, tiny_tokenizer()),
    )  # fmt: skip
    state = trainer.train(shared, config(iterations=2))
    assert state.history[0]["objective/kl"] == 0.0 != state.history[1]["objective/kl"]
    assert_close(shared(prompts, responses), expected, atol=1e-6, rtol=1e-6)
    assert shared.model.policy is model


def test_one_base_serves_policy_reference_critic_and_reward_model(base: Path, reward_folder: Path) -> None:
    """The same roles with a base each would be four."""
    before = copies_of_the_base()
    model = policy(base)
    reward_on_policy(model, reward_folder)
    attach_critic_adapter(model)
    trainer = PPOTrainer(
        PPOConfig(batch_size=4, mini_batch_size=4), model,
        tokenizer=tiny_tokenizer(), dataset=PromptDataset.from_texts(TEXTS, tiny_tokenizer()),
    )  # fmt: skip
    assert trainer.ref_model is None and copies_of_the_base() - before == 1
    base_size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(base).parameters())
    added = {
        name: sum(parameter.numel() for parameter in adapter_parameters(model.pretrained_model, name).values())
        for name in ("default", "reward_adapter", CRITIC_ADAPTER)
    }
    heads = (WIDTH + 1) + WIDTH + (WIDTH + 1)  # value head, score (no bias), the critic's
    whole = base_size + sum(added.values()) + heads
    assert sum(parameter.numel() for parameter in model.parameters()) == whole
    trained = added["default"] + added[CRITIC_ADAPTER] + WIDTH + 1
    assert (
        describe_trainable_parameters(model)
        == f"{trained:,} of {whole:,} parameters are trained ({trained / whole:.2%})"
    )


def test_a_critic_adapter_starts_at_zero_and_its_loss_moves_nothing_of_the_policy(base: Path) -> None:
    model = policy(base)
    attach_critic_adapter(model, lora(r=2, target_modules=["o_proj"]))
    assert all(not row.any() for row in model.critic(INPUTS))  # type: ignore[misc]
    nn.init.normal_(model.critic.head.weight)  # type: ignore[union-attr, arg-type]
    torch.cat(model.critic(INPUTS)).sum().backward()  # type: ignore[misc]
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved and all(f".{CRITIC_ADAPTER}." in name or name.startswith("critic.head.") for name in moved)
    assert model.pretrained_model.active_adapter == "default"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_A.default" in name for name in trained) and not any("v_head" in name for name in trained)


def test_a_critic_adapter_has_no_part_that_its_values_do_not_run_through(base: Path) -> None:
    """A part on the LM head would get no gradient: an error of the critic's own fits, and of DDP."""
    model = policy(base, target_modules=["q_proj", "lm_head"])
    before = model(INPUTS.prompts[0][None])[0]
    attach_critic_adapter(model)
    assert torch.equal(model(INPUTS.prompts[0][None])[0], before)
    names = set(adapter_parameters(model.pretrained_model, CRITIC_ADAPTER))
    assert names and not any("lm_head" in name for name in names)
    torch.cat(model.critic(INPUTS)).sum().backward()  # type: ignore[misc]
    assert all(parameter.grad is not None for parameter in model.critic.parameters())  # type: ignore[union-attr]
    trainer = PPOTrainer(
        PPOConfig(batch_size=4, mini_batch_size=4), model, tokenizer=tiny_tokenizer(),
        dataset=PromptDataset.from_texts(TEXTS, tiny_tokenizer()), algorithm=PPOClip(critic=Critic(extra_fits=1)),
    )  # fmt: skip
    trainer.train(share_of_e, config(iterations=2))
    assert model.pretrained_model.active_adapter == "default"


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_critic_adapter_keeps_its_tokens_where_the_lm_head_is_tied_to_the_embedding() -> None:
    config = lora(trainable_token_indices=[5, 8])
    tied = tiny_llama(tie_word_embeddings=True)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tied, peft_config=config)
    attach_critic_adapter(model)
    nn.init.ones_(model.critic.head.weight)  # type: ignore[union-attr, arg-type]
    torch.cat(model.critic(INPUTS)).square().sum().backward()  # type: ignore[misc]
    own = adapter_parameters(model.pretrained_model, CRITIC_ADAPTER)
    (tokens,) = (parameter for name, parameter in own.items() if "trainable_tokens" in name)
    assert tokens.grad is not None and bool(tokens.grad.any(dim=1).all())  # both are in the rows


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_initialization_that_moves_the_base_moves_it_for_no_second_adapter(
    base: Path, reward_folder: Path, start: str, tmp_path: Path
) -> None:
    model, tokens = policy(base, init_lora_weights=start), torch.tensor([[5, 6, 7]])
    before, states = model(tokens)[0], model.pretrained_model.base_model.model.model(tokens).last_hidden_state
    with pytest.raises(ValueError, match="policy's adapter with init_lora_weights"):
        attach_reward_adapter(model, str(reward_folder))
    attach_critic_adapter(model)
    assert torch.equal(model(tokens)[0], before)
    with active_adapter(model.pretrained_model, CRITIC_ADAPTER):  # the critic's trunk is the policy's
        assert_close(model.pretrained_model.base_model.model.model(tokens).last_hidden_state, states)
    model = policy(base)
    before = model(tokens)[0]
    with pytest.raises(ValueError, match="leaves the base as it is"):
        attach_critic_adapter(model, lora(init_lora_weights=start))
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    get_peft_model(classifier, lora(task_type="SEQ_CLS", init_lora_weights=start)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a reward adapter with init_lora_weights"):
        attach_reward_adapter(model, str(tmp_path))
    assert torch.equal(model(tokens)[0], before)


def test_a_critic_adapter_that_starts_as_the_reward_model_gives_its_score(base: Path, reward_folder: Path) -> None:
    model = policy(base)
    scorer = attach_reward_adapter(model, str(reward_folder))
    attach_critic_adapter(model, from_reward_adapter=True, gain=2.0, bias=-1.0)
    values = model.critic(INPUTS)  # type: ignore[misc]
    for row, (prompt, response) in enumerate(zip(INPUTS.prompts, INPUTS.responses, strict=True)):
        ids = torch.cat([prompt, response])[None]
        raw = scorer(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]
        assert_close(values[row][-1], 2.0 * raw - 1.0)
    with torch.no_grad():
        for parameter in adapter_parameters(model.pretrained_model, CRITIC_ADAPTER).values():
            parameter.zero_()
    assert_close(scorer(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0], raw)  # a copy, not a view


def test_recomputed_layers_of_the_critic_run_under_its_own_adapter(base: Path) -> None:
    """In the backward pass the policy's adapter is active again; recomputing with it gives other gradients."""
    gradients = []
    for checkpointing in (False, True):
        model = policy(base)
        attach_critic_adapter(model)
        torch.manual_seed(2)
        for name in ("default", CRITIC_ADAPTER):
            for parameter in adapter_parameters(model.pretrained_model, name).values():
                nn.init.normal_(parameter, std=0.2)
        nn.init.normal_(model.critic.head.weight)  # type: ignore[union-attr, arg-type]
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        torch.cat(model.critic(INPUTS)).square().sum().backward()  # type: ignore[misc]
        gradients.append([parameter.grad for parameter in model.critic.parameters()])  # type: ignore[union-attr]
        assert model.pretrained_model.active_adapter == "default"
    assert_close(gradients[1], gradients[0])
    assert all(gradient.any() for gradient in gradients[0])


@pytest.mark.slow
def test_a_run_with_a_critic_adapter_resumes_bit_for_bit(base: Path, reward_folder: Path, tmp_path: Path) -> None:
    def run(folder: Path, *, stop_at: int | None = None) -> PPOTrainer:
        model = policy(base)
        source = reward_on_policy(model, reward_folder)
        attach_critic_adapter(model, from_reward_adapter=True, gain=2.0, bias=-1.0)
        own = PPOTrainer(
            PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=1, learning_rate=0.01), model,
            tokenizer=tiny_tokenizer(), dataset=PromptDataset.from_texts(TEXTS, tiny_tokenizer()),
        )  # fmt: skip
        own.train(
            source, config(folder, iterations=2, save_every=1),
            callbacks=[lambda _, state: state.iteration == stop_at],
        )  # fmt: skip
        return own

    whole = run(tmp_path / "whole")
    run(tmp_path / "resumed", stop_at=1)
    resumed = run(tmp_path / "resumed")
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    start = dict(policy(base).named_parameters())
    assert any(
        f".{CRITIC_ADAPTER}." in name and name not in start and one.grad is None
        for name, one in whole.model.named_parameters()
    )


def test_what_cannot_share_a_base_is_refused_and_the_policy_is_as_it_was(
    base: Path, reward_folder: Path, tmp_path: Path
) -> None:
    plain = AutoModelForCausalLMWithValueHead.from_pretrained(str(base))
    with pytest.raises(ValueError, match="expected a policy with adapters"):
        attach_reward_adapter(plain, str(reward_folder))
    with pytest.raises(ValueError, match="expected a causal policy with adapters"):
        attach_critic_adapter(plain)
    tiny_llama(hidden_size=WIDTH, seed=4).save_pretrained(tmp_path / "other")
    other = policy(tmp_path / "other")
    before = [name for name, _ in other.named_parameters()]
    with pytest.raises(ValueError, match="expected a reward adapter on the policy's base"):
        reward_on_policy(other, reward_folder)
    with pytest.raises(ValueError, match="got one without: the critic has nothing to start from"):
        attach_critic_adapter(other, from_reward_adapter=True)
    with pytest.raises(ContractError, match=r"reward_model\.json"):
        reward_on_policy(other, base)
    assert [name for name, _ in other.named_parameters()] == before
    attach_critic_adapter(other)
    with pytest.raises(ValueError, match="expected a policy without a critic"):
        attach_critic_adapter(other)


def test_what_is_saved_is_the_policy_alone(base: Path, reward_folder: Path, tmp_path: Path) -> None:
    model = policy(base)
    reward_on_policy(model, reward_folder)
    attach_critic_adapter(model)
    model.save_pretrained(tmp_path)
    assert not [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert (tmp_path / "adapter_model.safetensors").is_file() and (tmp_path / "pytorch_model.bin").is_file()
