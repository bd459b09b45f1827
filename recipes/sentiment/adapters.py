"""What stands on the policy's base beside the policy, and in how many bits that base is held."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig

from reward_model.on_policy import reward_on_policy
from rlhf_ppo import AutoModelForCausalLMWithValueHead
from rlhf_ppo.models.adapters import describe_trainable_parameters
from rlhf_ppo.models.shared_base_adapters import attach_critic_adapter

from .command_line import is_main_process
from .reviews import ReviewParts
from .rewards import reward_source


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """One base for several roles (docs/lora.md), and who calls the reward model."""

    critic: Literal["head", "adapter"] = "head"
    """Who gives the values: a head on the policy's trunk, or an adapter of its own on the policy's base (with LoRA)."""
    reward_on_base: bool = False
    """--reward-model is an adapter on the policy's base: score with it there, without a second base (with LoRA)."""
    load_in_4bit: bool = False
    """QLoRA: hold the frozen base in 4 bits (NF4); needs bitsandbytes, and --lora-rank."""
    reward_calls: Literal["each", "once"] = "each"
    """Of several processes: each asks for the rewards of its own responses, or process 0 for all in one request."""

    def check_adapters(self, lora_rank: int, reward_url: str | None) -> None:
        """Refuse what needs adapters where there are none.

        Raises:
            ValueError: Naming the flag, before anything is loaded.
        """
        asked = {
            "--critic adapter": self.critic == "adapter",
            "--reward-on-base": self.reward_on_base,
            "--load-in-4bit": self.load_in_4bit,
        }
        wanted = [flag for flag, is_on in asked.items() if is_on]
        if wanted and not lora_rank:
            raise ValueError(f"{wanted[0]} needs a frozen base under adapters, got --lora-rank 0: give e.g. 16")
        if self.reward_on_base and reward_url is not None:
            raise ValueError("--reward-on-base and --reward-url name two reward models: leave one of them out")
        if self.load_in_4bit and find_spec("bitsandbytes") is None:
            raise ValueError(
                "--load-in-4bit needs bitsandbytes, which is not installed: `pip install 'rlhf_ppo[quantization]'`"
            )

    @property
    def quantization(self) -> BitsAndBytesConfig | None:
        """How the base is loaded (Dettmers et al. 2023): NF4, its constants quantized too."""
        if not self.load_in_4bit:
            return None
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        )  # fmt: skip

    def furnish(
        self, policy: AutoModelForCausalLMWithValueHead, choice: str, parts: ReviewParts
    ) -> tuple[Callable[..., list[float]], str]:
        """Put the critic on the policy's base, and the reward model where it was asked for; and lines about that."""
        if self.critic == "adapter":
            attach_critic_adapter(policy)
        if self.reward_calls == "once" and not is_main_process():
            return _never_asked, ""
        reward: Callable[..., list[float]]
        if self.reward_on_base:
            reward, line = reward_on_policy(policy, choice), f"adapter of {choice} on the policy's base"
        else:
            reward, line = reward_source(choice, parts)
        return reward, f"{line}\n{describe_trainable_parameters(policy)}"


def model_line(folder: str, lora_rank: int) -> str:
    """Where the policy was saved, and how an adapter becomes a plain model."""
    if not lora_rank:
        return f"model: {folder}"
    return f"adapter: {folder}; as a plain model: python -m rlhf_ppo.merge {folder} {folder}-merged"


def _never_asked(**_: Any) -> list[float]:
    raise RuntimeError("only process 0 asks the reward model (--reward-calls once)")
