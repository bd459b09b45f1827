"""Every kind of PEFT adapter is trained, saved, loaded and merged right, or refused in a sentence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PromptTuningConfig,
    VeraConfig,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf_ppo.models.merging import save_merged
from tests.models.zoo import PROMPTS, RESPONSES, own_scores
from tests.support.tiny_models import tiny_llama, tiny_tokenizer

QV = ["q_proj", "v_proj"]
KINDS: dict[str, Any] = {
    "dora": LoraConfig(r=4, target_modules=QV, use_dora=True),
    "rslora": LoraConfig(r=4, target_modules=QV, use_rslora=True),
    "pissa": LoraConfig(r=4, target_modules=QV, init_lora_weights="pissa"),
    "norm": LoraConfig(r=4, target_modules=QV, modules_to_save=["norm"]),
    "tokens": LoraConfig(r=4, target_modules=QV, trainable_token_indices=[5, 6, 30]),
    "adalora": AdaLoraConfig(target_modules=QV, total_step=10, init_r=4, target_r=2, tinit=1, tfinal=2),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=4, target_modules=QV),
    "lokr": LoKrConfig(r=4, target_modules=QV),
    "oft": OFTConfig(r=0, oft_block_size=4, target_modules=QV),
    "boft": BOFTConfig(boft_block_size=4, target_modules=QV),
    "vera": VeraConfig(r=4, target_modules=QV),
}


def trainer_of(folder: Path, config: Any) -> PPOTrainer:
    tiny_llama().save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    settings = PPOConfig(batch_size=3, mini_batch_size=3, ppo_epochs=1, learning_rate=1e-2, diagnose=False)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=config)
    return PPOTrainer(settings, policy, None, tiny_tokenizer())


def scores_of(model: Any) -> Tensor:
    """Log-probabilities of all responses by the model's own call."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return torch.cat([own_scores(model.eval(), *pair)[0] for pair in zip(PROMPTS, RESPONSES, strict=True)])


def learn(trainer: PPOTrainer) -> float:
    """The KL of one step, before it."""
    scores = [torch.tensor(score) for score in (1.0, -1.0, 0.5)]
    return float(trainer.step(PROMPTS, RESPONSES, scores)["objective/kl"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PEFT's own, by kind
@pytest.mark.parametrize("name", KINDS)
def test_an_adapter_of_each_kind_learns_loads_and_merges(name: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / "base", KINDS[name])
    model: Any = trainer.model
    start = scores_of(model.pretrained_model)
    assert abs(learn(trainer)) < 1e-5  # the reference is the model that training starts from
    learn(trainer)
    found = scores_of(model.pretrained_model)
    assert float((found - start).abs().max()) > 1e-4
    with trainer.reference_context():
        assert float((scores_of(model.pretrained_model) - start).abs().max()) < 1e-4
    trainer.save_pretrained(str(tmp_path / "saved"))
    loaded: Any = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "saved"))
    save_merged(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for other in (loaded.pretrained_model, merged, model.pretrained_model):
        assert float((scores_of(other) - found).abs().max()) < 1e-4


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
def test_an_adapter_that_peft_cannot_merge_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """A bias of LoRA's own has no place in a layer without one."""
    trainer = trainer_of(tmp_path / "base", LoraConfig(r=4, target_modules=QV, lora_bias=True))
    with pytest.raises(ValueError, match="expected an adapter that PEFT can merge"):
        save_merged(trainer.model, tmp_path / "merged")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=QV, task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptTuningConfig(num_virtual_tokens=4),
    ],
)
def test_adapters_that_only_peft_s_own_call_switches_on_are_refused(config: Any, tmp_path: Path) -> None:
    """Before PEFT sees them, which has words of its own for settings that miss."""
    with pytest.raises(ValueError, match=r"alora_invocation_tokens|not supported for PPO training"):
        trainer_of(tmp_path, config)
