"""A separate critic with its own transformer, initialized from the policy or from a reward model."""

import copy
import logging
import re
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from rlhf_ppo.batch import TokenInputs, pad_rows
from rlhf_ppo.models.adapters import REFERENCE_ADAPTER, merged_model
from rlhf_ppo.models.dropout import disable_dropout
from rlhf_ppo.models.trunk import layers_of
from rlhf_ppo.models.value_head import last_hidden_size
from rlhf_ppo.utils.files import rename_aside

logger = logging.getLogger(__name__)

CRITIC_FOLDER, CRITIC_HEAD = "critic", "head.safetensors"
"""Where a separate critic is saved beside the policy."""


class SeparateCritic(nn.Module):
    """V(s_t) from a separate causal transformer, so that the value loss trains no weight of the policy.

    Costs a second model in memory and a second pass. It must use the policy's tokenizer.

    Args:
        backbone: A causal transformer without LM head, such as `model.base_model`.
        head: Maps its last hidden state to one number.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @classmethod
    def from_reward_model(cls, classifier: Any, *, gain: float = 1.0, bias: float = 0.0) -> "SeparateCritic":
        """Initialize from a reward model: V after a full response is its score (Stiennon et al. 2020, appendix B.1).

        Args:
            classifier: A causal sequence classifier with one label (`AutoModelForSequenceClassification`), copied, its
                adapter merged. The copy is trained, also where the classifier is frozen.
            gain: Scale of the reward model's normalization: V = gain · raw + bias.
            bias: See `gain`.

        Raises:
            ValueError: The classifier is not causal, has more than one label, or its weights are quantized.
        """
        _check_not_quantized(classifier, "Load the reward model in another precision.")
        if isinstance(classifier, PeftModel):
            classifier = copy.deepcopy(classifier).merge_and_unload()
        score = getattr(classifier, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            raise ValueError(
                f"expected a causal sequence classifier with one label and a head `score`, got "
                f"{type(classifier).__name__}: an encoder sees later tokens, which a critic must not. Train the reward "
                "model on a causal language model."
            )
        head = nn.Linear(score.in_features, 1, dtype=score.weight.dtype)
        with torch.no_grad():
            head.weight.copy_(gain * score.weight)
            head.bias.fill_(bias if score.bias is None else gain * float(score.bias) + bias)
        return cls(copy.deepcopy(classifier.base_model).requires_grad_(True), head)

    @classmethod
    def from_policy(cls, model: Any) -> "SeparateCritic":
        """Initialize from a copy of the policy's trunk, adapters merged into it, and a zero head: V = 0 everywhere.

        Raises:
            ValueError: The policy's weights are quantized.
        """
        _check_not_quantized(model, "Use attach_critic_adapter, or SeparateCritic.from_reward_model.")
        head = nn.Linear(last_hidden_size(model.config), 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        policy = model.pretrained_model
        copied = merged_model(policy, str(model.policy_adapter_name)) if model.is_peft_model else copy.deepcopy(policy)
        return cls(layers_of(copied).requires_grad_(True), head)

    def forward(self, inputs: TokenInputs) -> list[Float[Tensor, " states"]]:
        """V(s_0) ... V(s_T) of each row, without padding, float32."""
        return state_values(self.backbone, self.head, inputs)


def _check_not_quantized(model: Any, remedy: str) -> None:
    if any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
        raise ValueError(
            "expected a model in float32, bfloat16 or float16 to start from, got one in 4 or 8 bits: a copy of such "
            f"weights cannot be trained. {remedy}"
        )


def state_values(backbone: nn.Module, head: nn.Linear, inputs: TokenInputs) -> list[Float[Tensor, " states"]]:
    """V(s_0) ... V(s_T) of each row, float32: `head` on the last hidden states of `backbone`."""
    rows = [torch.cat(pair) for pair in zip(inputs.prompts, inputs.responses, strict=True)]
    input_ids = pad_rows(rows)
    # Padding is on the right, where a causal model does not attend to it.
    hidden = backbone(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).last_hidden_state
    values = head(hidden.to(head.weight.dtype)).squeeze(-1).float()
    triples = zip(values, inputs.prompts, rows, strict=True)
    return [row[len(prompt) - 1 : len(tokens)] for row, prompt, tokens in triples]


def _embeddings(model: Any) -> int:
    """Number of token embeddings, adapted or not; ZeRO-3 leaves an empty weight in place of a shard."""
    weight = model.get_input_embeddings().weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def attach_critic(model: Any, critic: SeparateCritic) -> None:
    """Use `critic` for the values of `model`, and freeze its value head.

    Call it before the trainer or an optimizer is built. Checkpoints of `train()` contain the critic; the trainer's
    `save_pretrained` saves it beside the policy, and `from_pretrained` attaches it again.

    Raises:
        ValueError: The model is an encoder-decoder, or the critic has fewer token embeddings than the policy.
    """
    if model.is_encoder_decoder:
        raise ValueError(
            "expected a causal policy, got an encoder-decoder: a separate critic reads prompt and response as one "
            "sequence. Train the encoder-decoder's own value head."
        )
    critic_size, policy_size = (_embeddings(part) for part in (critic.backbone, model.pretrained_model))
    if critic_size < policy_size:
        raise ValueError(
            f"the critic has {critic_size} token embeddings, the policy {policy_size}: they do not share a tokenizer, "
            "so the critic would read other texts. Train the reward model with the policy's tokenizer."
        )
    model.v_head.requires_grad_(False)
    disable_dropout(critic)  # as in the policy, passes are deterministic
    model.critic = critic.to(model.pretrained_model.get_input_embeddings().weight.device)


ATTENTION = re.compile(r"^(?!.*(?:norm|ln)).*att(?:n|ention)", re.IGNORECASE)
"""The name of an attention module; norms before and after one (`post_attention_layernorm`) belong to the block."""


def freeze_critic(model: Any, part: Literal["attention", "trunk"]) -> None:
    """Freeze a separate critic's attention, or all of it but its head; a ValueError if there is no such part."""
    if not isinstance(model.critic, SeparateCritic):
        raise ValueError(
            f"Critic(freeze={part!r}) is for a separate critic, got {type(model.critic).__name__}: the value head "
            "shares the policy's trunk, which must learn. Use attach_critic before the trainer is built."
        )
    frozen = [
        parameter
        for name, parameter in model.critic.backbone.named_parameters()
        if part == "trunk" or any(map(ATTENTION.search, name.split(".")))
    ]
    if not frozen:
        raise ValueError("expected parameters with 'attn' or 'attention' in their names, got none: nothing is frozen")
    for parameter in frozen:
        parameter.requires_grad_(False)


def save_critic(model: Any, folder: Path) -> None:
    """Save a separate critic in `folder/critic`, where `from_pretrained` finds it; without one do nothing."""
    if isinstance(model.critic, SeparateCritic):
        backbone: Any = model.critic.backbone
        backbone.save_pretrained(folder / CRITIC_FOLDER)
        save_file(dict(model.critic.head.state_dict()), folder / CRITIC_FOLDER / CRITIC_HEAD)


def forget_earlier_parts(model: Any, folder: Path) -> None:
    """Rename the files by which parts of an earlier policy in `folder` would be found and loaded with this one."""
    adapters = model.pretrained_model.peft_config if model.is_peft_model else ()
    found_by = {
        "adapter_config.json": model.is_peft_model,
        f"{REFERENCE_ADAPTER}/adapter_config.json": REFERENCE_ADAPTER in adapters,
        f"{CRITIC_FOLDER}/{CRITIC_HEAD}": isinstance(model.critic, SeparateCritic),
    }
    for name, is_saved_anew in found_by.items():
        if not is_saved_anew and (folder / name).is_file():
            aside = rename_aside(folder / name)
            logger.warning("%s is of the policy that was saved in %s before: renamed to %s.", name, folder, aside.name)


def attach_saved_critic(model: Any, source: str) -> None:
    """Attach the critic that `save_critic` wrote beside a policy, if `source` is a folder with one."""
    folder = Path(source) / CRITIC_FOLDER
    if not (folder / CRITIC_HEAD).is_file():
        return
    state = load_file(folder / CRITIC_HEAD)
    head = nn.Linear(state["weight"].shape[1], 1, dtype=state["weight"].dtype)
    head.load_state_dict(state)
    attach_critic(model, SeparateCritic(AutoModel.from_pretrained(folder, dtype=head.weight.dtype), head))
