"""A critic and a reward model as further adapters on the policy's frozen base, which is in memory only once."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf_ppo.batch import TokenInputs
from rlhf_ppo.kernels.linear_layers import plain_layers
from rlhf_ppo.models import adapters
from rlhf_ppo.models.critic import state_values
from rlhf_ppo.models.dropout import EvalMode
from rlhf_ppo.models.pretrained import PreTrainedModelWrapper
from rlhf_ppo.models.trunk import layers_of
from rlhf_ppo.models.value_head import last_hidden_size

CRITIC_ADAPTER = "critic"


class AdapterCritic(nn.Module):
    """V(s_t) from the policy's base with a separate adapter: a separate critic that needs no second base in memory.

    As with `SeparateCritic`, the value loss trains no weight of the policy, and a second pass is needed.

    Args:
        model: Has the critic's and the policy's adapter.
        head: Maps the last hidden state to one number.
    """

    def __init__(self, model: PeftModel, head: nn.Linear, name: str = CRITIC_ADAPTER) -> None:
        super().__init__()
        self._policy_model = (model,)  # in a tuple, so that it is not registered as a submodule of the critic
        self.name = name
        self.head = head
        self.adapter = nn.ParameterList(adapters.adapter_parameters(model, name).values())

    def forward(self, inputs: TokenInputs) -> list[Float[Tensor, " states"]]:
        """V(s_0) ... V(s_T) of each row, without padding, float32."""
        (model,) = self._policy_model
        with adapters.active_adapter(model, self.name):
            return state_values(layers_of(model), self.head, inputs)


def attach_critic_adapter(
    model: PreTrainedModelWrapper,
    peft_config: LoraConfig | None = None,
    *,
    from_reward_adapter: bool = False,
    gain: float = 1.0,
    bias: float = 0.0,
) -> None:
    """Add a critic adapter on the policy's base, use it for the values, and freeze the value head.

    Call it before the trainer or an optimizer is built. It starts with V = 0, or as the reward model. Checkpoints of
    `train()` contain the critic; `save_pretrained` saves the policy alone.

    Args:
        model: A policy with adapters.
        peft_config: Config of the critic's adapter; None: that of the policy's, or of the reward model's.
        from_reward_adapter: Initialize from the reward adapter of `model`: V after a complete response is its score
            (Stiennon et al. 2020, appendix B.1).
        gain: Scale of the reward model's normalization: V = gain · raw + bias.
        bias: See `gain`.

    Raises:
        ValueError: The model has no adapters, has a critic already, is an encoder-decoder, or has no reward adapter;
            or an initialization of the critic's adapter would change the base.
    """
    _check_critic(model, peft_config, from_reward_adapter)
    peft_model: PeftModel = model.pretrained_model
    source = str(model.rm_adapter_name if from_reward_adapter else model.policy_adapter_name)
    own: Any = peft_model.peft_config[source]
    config = adapters.with_plain_start(own if peft_config is None else peft_config)
    config.inference_mode = False
    config.modules_to_save = None  # a trained LM head is the policy's
    head = nn.Linear(last_hidden_size(model.config), 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    with adapters.preserve_requires_grad(peft_model):
        peft_model.add_adapter(CRITIC_ADAPTER, config)
        if from_reward_adapter or (peft_config is None and adapters.changes_base(own)):  # a part of the trunk is there
            weights = get_peft_model_state_dict(peft_model, adapter_name=source, save_embedding_layers=False)
            set_peft_model_state_dict(peft_model, weights, adapter_name=CRITIC_ADAPTER)
        if from_reward_adapter:
            with torch.no_grad():
                head.weight.copy_(gain * model.score.weight)
                head.bias.fill_(bias if model.score.bias is None else gain * float(model.score.bias) + bias)
        _delete_unused_parts(peft_model)
    critic = AdapterCritic(peft_model, head.to(model.v_head.summary.weight.device))
    model.v_head.requires_grad_(False)
    model.critic = critic.requires_grad_(True)


def _delete_unused_parts(model: PeftModel) -> None:
    """Delete the parts of the critic's adapter outside of the layers that it runs, such as that on the LM head.

    Trained tokens of a tied LM head are those of the embedding, which the critic reads.
    """
    used = {id(module) for module in layers_of(model).modules()}
    for module in model.modules():
        is_own = isinstance(module, BaseTunerLayer) and getattr(module, "tied_adapter", None) is None
        if is_own and id(module) not in used:
            module.delete_adapter(CRITIC_ADAPTER)  # type: ignore[operator]


def _check_critic(model: PreTrainedModelWrapper, peft_config: LoraConfig | None, from_reward_adapter: bool) -> None:
    if not model.is_peft_model or model.is_encoder_decoder:
        raise ValueError(
            f"expected a causal policy with adapters, got {type(model.pretrained_model).__name__}: its base is "
            "trained (or is no causal model), so a critic cannot share it. Load it with `peft_config=LoraConfig("
            "...)`, or give it a SeparateCritic."
        )
    if model.critic is not None:
        raise ValueError("expected a policy without a critic, got one that has one already: it would be replaced.")
    if from_reward_adapter and (not model.supports_rm_adapter or model.score.out_features != 1):
        raise ValueError(
            "expected a policy with a reward adapter of one label, got one without: the critic has nothing to start "
            "from. Load the policy with `reward_adapter='folder'`, or leave from_reward_adapter at False."
        )
    if from_reward_adapter and peft_config is not None:
        raise ValueError(
            "expected from_reward_adapter or peft_config, got both: the critic has the shape of the adapter that it "
            "starts from. Leave peft_config out."
        )
    if peft_config is not None and adapters.changes_base(peft_config):
        raise ValueError(
            "expected an adapter that leaves the base as it is, got init_lora_weights="
            f"{peft_config.init_lora_weights!r}: PEFT would change the policy's own weights with it. Use "
            "init_lora_weights=True."
        )


class RewardAdapterModel:
    """A causal sequence classifier: the policy's base with the reward model's adapter and score head.

    Called like `AutoModelForSequenceClassification`, with the same logits for the same token ids (computed by torch's
    matrix products, not the policy's fast ones). Does not change the policy. Batches are padded on the right.

    Args:
        model: A policy loaded with `reward_adapter`, or given one by `attach_reward_adapter`.
    """

    def __init__(self, model: PreTrainedModelWrapper) -> None:
        if not model.supports_rm_adapter or model.rm_adapter_name is None:
            raise ValueError(
                "expected a policy with a reward adapter, got one without: there is nothing to score with. Load it "
                "with `reward_adapter='folder'`."
            )
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError(
                "expected unsharded parameters, got those of ZeRO-3: each process scores its own samples, and would "
                "wait for shards that the others do not send. Use ZeRO-2, or a separate reward model."
            )
        self.policy, self.config = model, model.config

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    @property
    def base_model(self) -> Any:
        """The layers shared with the policy."""
        return layers_of(self.policy.pretrained_model)

    def eval(self) -> "RewardAdapterModel":
        """Return self; it is never in training mode."""
        return self

    @torch.no_grad()
    def __call__(self, *, input_ids: Int[Tensor, "rows time"], attention_mask: Tensor) -> SequenceClassifierOutput:
        """Logits [rows, labels] at each row's last token, in the score head's precision."""
        peft_model: PeftModel = self.policy.pretrained_model
        last = attention_mask.long().sum(dim=1) - 1
        scoring = adapters.active_adapter(peft_model, str(self.policy.rm_adapter_name))
        with EvalMode(peft_model), scoring, plain_layers(peft_model):
            hidden = layers_of(peft_model)(
                # The padding token may exist only in the reward model's own embedding table.
                input_ids=input_ids.masked_fill(attention_mask == 0, 0), attention_mask=attention_mask,
                use_cache=False,
            ).last_hidden_state  # fmt: skip
        states = hidden[torch.arange(len(last), device=hidden.device), last]
        score = self.policy.score.to(states.device)
        logits: Any = score(states.to(score.weight.dtype))
        return SequenceClassifierOutput(logits=logits)


def attach_reward_adapter(
    model: PreTrainedModelWrapper, folder: str, name: str = "reward_adapter"
) -> RewardAdapterModel:
    """Add the reward model's adapter in `folder` to a loaded policy, and return the reward model.

    Raises:
        ValueError: The policy has no adapters, the folder is missing, or the reward model was trained on another base
            (one that PiSSA or the like has changed for an adapter, too).
    """
    if not model.is_peft_model:
        raise ValueError(
            f"expected a policy with adapters, got {type(model.pretrained_model).__name__}: its base is trained, and "
            "the reward model would change with it. Load it with `peft_config=LoraConfig(...)`."
        )
    adapters.check_reward_source(folder)
    peft_model: PeftModel = model.pretrained_model
    policy_base = peft_model.peft_config[str(model.policy_adapter_name)].base_model_name_or_path
    adapter_base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if policy_base and adapter_base and not _is_same_model(policy_base, adapter_base):
        raise ValueError(
            f"expected a reward adapter on the policy's base {policy_base!r}, got one on {adapter_base!r} ({folder}): "
            "its scores would be wrong. Train the reward model on the policy's base, or load it separately."
        )
    model.score = adapters.add_reward_adapter(peft_model, folder, name)
    model.rm_adapter_name, model.supports_rm_adapter = name, True
    return RewardAdapterModel(model)


def _is_same_model(name: str, other: str) -> bool:
    """Whether two names mean the same model: equal names, or paths of the same folder."""
    first, second = Path(name), Path(other)
    return name == other or (first.exists() and second.exists() and first.samefile(second))
