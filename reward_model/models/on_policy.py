"""Load a LoRA reward model onto the policy's base model, to hold the base in memory once."""

from pathlib import Path

from transformers import AutoTokenizer

from reward_model.models.contract import Contract, ContractError
from reward_model.models.loading import ADAPTER_FILE, check_tokenizer
from reward_model.models.model import RewardModel
from rlhf_ppo.models.pretrained import PreTrainedModelWrapper
from rlhf_ppo.models.shared_base_adapters import attach_reward_adapter


def reward_on_policy(
    policy: PreTrainedModelWrapper, path: str | Path, *, max_tokens: int = 16_384, trust_remote_code: bool = False
) -> RewardModel:
    """Load the reward model of `path` onto the base of `policy`; it scores as `RewardModel.from_pretrained(path)`.

    Call it before the trainer is built. The precision is that of the policy: with bfloat16 weights, scores are those of
    a reward model loaded in bfloat16.

    Args:
        policy: A causal policy with adapters, on the base that the reward model was trained on.
        path: Folder that `train_reward_model` wrote with `lora_rank` and `merge_adapter=False`.
        max_tokens: Maximum of padded tokens per forward pass.
        trust_remote_code: Whether Python code that comes with the tokenizer may run.

    Raises:
        ContractError: The folder has no adapter, or its files do not match each other.
        ValueError: The policy has no adapters, or another base.
    """
    folder = Path(path)
    contract = Contract.read(folder)
    if contract.kind != "single" or not (folder / ADAPTER_FILE).is_file():
        raise ContractError(
            f"expected a reward model that is an adapter, got {folder} without {ADAPTER_FILE}: it has weights of its "
            "own. Train it with lora_rank and merge_adapter=False, or load it with `RewardModel.from_pretrained`."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    check_tokenizer(tokenizer, policy, contract, folder)
    return RewardModel(attach_reward_adapter(policy, str(folder)), tokenizer, contract, max_tokens=max_tokens)
