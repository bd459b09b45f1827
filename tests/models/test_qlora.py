"""QLoRA: adapters on a base in 4 bits. Runs where bitsandbytes is installed, which computes on CPUs too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from rlhf_ppo.kernels.linear_layers import use_plain_layers
from rlhf_ppo.merge import merge
from rlhf_ppo.models.adapters import describe_trainable_parameters
from rlhf_ppo.models.merging import save_merged
from rlhf_ppo.models.shared_base_adapters import attach_critic_adapter
from rlhf_ppo.rollout.prompts import PromptDataset
from tests.support.tiny_models import tiny_llama, tiny_tokenizer
from tests.support.tiny_run import TEXTS, config, share_of_e

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the extra: pip install 'rlhf_ppo[quantization]'")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
TOKENS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def base(tmp_path: Path) -> str:
    tiny_llama(hidden_size=64).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


FP4 = {"load_in_4bit": True}
NF4 = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}


def policy(base: str, kind: dict[str, Any] = FP4) -> AutoModelForCausalLMWithValueHead:
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return AutoModelForCausalLMWithValueHead.from_pretrained(base, peft_config=lora, **kind).eval()


@pytest.mark.parametrize("kind", [FP4, NF4], ids=["fp4", "nf4"])
def test_a_base_in_four_bits_is_the_reference_and_does_not_move(
    base: str, kind: dict[str, Any], tmp_path: Path
) -> None:
    model = policy(base, kind)
    attach_critic_adapter(model)
    whole = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(base).parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    heads = 65 + 65
    adapters = 2 * (trained - 65) // 2  # the policy's and the critic's, of one shape
    assert describe_trainable_parameters(model).startswith(
        f"{trained:,} of {whole + adapters + heads:,} parameters are trained"
    )
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    trainer = PPOTrainer(
        PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=1, learning_rate=0.01), model,
        tokenizer=tiny_tokenizer(), dataset=PromptDataset.from_texts(TEXTS, tiny_tokenizer()),
    )  # fmt: skip
    state = trainer.train(share_of_e, config(iterations=3))  # the first responses may all earn 0
    assert state.history[0]["objective/kl"] == 0.0 != state.history[-1]["objective/kl"]
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())

    use_plain_layers(model)  # of the head, as in the model that is loaded
    expected = model.eval()(TOKENS)[0].detach()
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "adapter"), **kind).eval()
    assert_close(again(TOKENS)[0], expected, atol=1e-6, rtol=0.0)


def test_gradients_of_a_base_in_four_bits_are_those_of_its_weights_unpacked(base: str) -> None:
    """On CPUs with AVX-512-BF16 bitsandbytes changes to a kernel without backward: lower layers got no gradient."""
    model = policy(base)
    with torch.no_grad():
        model(TOKENS)  # here it would change
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model(TOKENS)[0].square().sum().backward()
    plain = AutoModelForCausalLMWithValueHead.from_pretrained(
        base, peft_config=model.pretrained_model.peft_config["default"]
    ).eval()  # fmt: skip
    four = dict(model.pretrained_model.named_modules())
    with torch.no_grad():
        for name, parameter in plain.pretrained_model.named_parameters():
            weight = model.pretrained_model.get_parameter(name)
            if weight.dtype == torch.uint8:
                layer = four[name.removesuffix(".weight")]
                weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            parameter.copy_(weight)
    plain(TOKENS)[0].square().sum().backward()
    for name, parameter in plain.pretrained_model.named_parameters():
        if "lora_" in name:
            assert_close(model.pretrained_model.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-4)


def test_four_bits_are_not_merged_into_but_the_adapter_is_into_the_whole_base(base: str, tmp_path: Path) -> None:
    model = policy(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    with pytest.raises(ValueError, match=r"got one in 4 or 8 bits: .*`python -m rlhf_ppo\.merge ADAPTER FOLDER`"):
        save_merged(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "adapter")).eval()
    assert_close(merged(TOKENS).logits, whole(TOKENS)[0], atol=1e-5, rtol=1e-6)
