"""A policy with adapters, saved as a plain model: the same logits, and the policy is as it was."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.merge import main
from rlhf_ppo.models import prepare_reference_adapter
from rlhf_ppo.models.merging import save_merged
from rlhf_ppo.models.shared_base_adapters import attach_critic_adapter
from tests.support.tiny_models import tiny_gpt2, tiny_llama, tiny_tokenizer

TOKENS = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])


def adapted(base: Any, **settings: Any) -> AutoModelForCausalLMWithValueHead:
    """A policy whose adapter is far from 0, beside a critic's that is too."""
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})
    model = AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=config).eval()
    attach_critic_adapter(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name or "trainable_tokens" in name:
                parameter.normal_(std=0.1)
    return model


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    return float(((one - other).abs().max() / other.abs().max()).detach())


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, on tied heads and on Conv1D beside Linear
@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_gpt2, {"fan_in_fan_out": True}),
        (tiny_llama, {"use_dora": True}),
        (tiny_gpt2, {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": False}),
        (tiny_gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"], "fan_in_fan_out": True}),
        (tiny_gpt2, {"target_modules": ["c_attn"], "trainable_token_indices": [5, 6], "fan_in_fan_out": True}),
        (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
    ids=[
        "gpt2, tied",
        "llama, DoRA",
        "gpt2, the tied head",
        "gpt2, a copy of the tied head",
        "gpt2, some tokens",
        "llama, a whole module",
    ],
)
def test_a_merged_model_loads_plainly_with_the_logits_of_the_policy(
    make: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(make(), **settings)
    prepare_reference_adapter(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(TOKENS)[0].detach()
    save_merged(model, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain).__name__ in ("GPT2LMHeadModel", "LlamaForCausalLM")
    assert distance(plain(TOKENS).logits, expected) < 1e-5
    assert not torch.allclose(make()(TOKENS).logits, expected, atol=1e-2)
    assert torch.equal(model(TOKENS)[0], expected)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_command_merges_a_saved_adapter_into_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapted(str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    arguments = [str(tmp_path / "adapter"), str(tmp_path / "merged")]
    assert main(arguments) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(merged(TOKENS).logits, model(TOKENS)[0]) < 1e-5
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert main(arguments) == 1
    assert main([str(tmp_path / "base"), str(tmp_path / "again")]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    first, second = errors
    assert "holds a model already" in first and "holds no adapter" in second


def test_a_model_without_adapters_is_saved_as_it_is(tmp_path: Path) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    save_merged(model, tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, model(TOKENS)[0])
