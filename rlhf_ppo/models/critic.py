"""A critic with a trunk of its own, beside the policy instead of on it; it may start from a reward model."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_ppo.batch import TokenInputs, pad_rows
from rlhf_ppo.models.pretrained import PreTrainedModelWrapper
from rlhf_ppo.models.value_head import last_hidden_size


class SeparateCritic(nn.Module):
    """V(s_t) by a causal transformer of its own: the value loss then pulls at no weight of the policy.

    It costs a second model in memory and a second pass. It reads the policy's tokens, so it must have been trained
    with the policy's tokenizer.

    Args:
        backbone: A causal transformer without LM head, such as `model.base_model`.
        head: From its last hidden state to one number.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @classmethod
    def from_reward_model(cls, classifier: Any, *, gain: float = 1.0, bias: float = 0.0) -> "SeparateCritic":
        """Start as the reward model: V of a whole response is its score (Stiennon et al. 2020, appendix B.1).

        Args:
            classifier: A causal sequence classifier with one label (`AutoModelForSequenceClassification`), copied.
            gain: The reward model's normalization, so that values have the scale of the rewards: gain · raw + bias.
            bias: See `gain`.

        Raises:
            ValueError: The classifier is no causal one with a one-number head.
        """
        score = getattr(classifier, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            raise ValueError(
                f"expected a causal sequence classifier with one label and a head `score`, got "
                f"{type(classifier).__name__}: an encoder reads the future, which a critic must not. Train the reward "
                "model on a causal language model."
            )
        head = nn.Linear(score.in_features, 1, dtype=score.weight.dtype)
        with torch.no_grad():
            head.weight.copy_(gain * score.weight)
            head.bias.fill_(bias if score.bias is None else gain * float(score.bias) + bias)
        return cls(copy.deepcopy(classifier.base_model), head)

    @classmethod
    def from_policy(cls, model: PreTrainedModelWrapper) -> "SeparateCritic":
        """Start from a copy of the policy's trunk, with V = 0 everywhere."""
        head = nn.Linear(last_hidden_size(model.config), 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return cls(copy.deepcopy(model.pretrained_model.base_model).requires_grad_(True), head)

    def forward(self, inputs: TokenInputs) -> list[Float[Tensor, " states"]]:
        """V(s_0) ... V(s_T) of each row, without padding, float32."""
        return state_values(self.backbone, self.head, inputs)


def state_values(backbone: nn.Module, head: nn.Linear, inputs: TokenInputs) -> list[Float[Tensor, " states"]]:
    """V(s_0) ... V(s_T) of each row, float32: `head` on the last hidden states of `backbone`."""
    rows = [torch.cat(pair) for pair in zip(inputs.prompts, inputs.responses, strict=True)]
    input_ids = pad_rows(rows)
    # Padding stands on the right, where a causal model cannot see it.
    hidden = backbone(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).last_hidden_state
    values = head(hidden.to(head.weight.dtype)).squeeze(-1).float()
    spans = zip(values, inputs.prompts, rows, strict=True)
    return [row[len(prompt) - 1 : len(whole)] for row, prompt, whole in spans]


def attach_critic(model: PreTrainedModelWrapper, critic: SeparateCritic) -> None:
    """Let `critic` give the values of `model` from now on; the value head on the trunk is frozen.

    Do it before the trainer or an optimizer is built. Checkpoints of `train()` hold the critic; `save_pretrained`
    saves the policy alone.

    Raises:
        ValueError: The model is an encoder-decoder, or the critic knows fewer tokens than the policy.
    """
    if model.is_encoder_decoder:
        raise ValueError("a separate critic reads prompt and response as one text, which an encoder-decoder does not")
    known = critic.backbone.get_input_embeddings().num_embeddings  # type: ignore[operator]
    needed = model.pretrained_model.get_input_embeddings().num_embeddings
    if known < needed:
        raise ValueError(
            f"the critic has {known} token embeddings, the policy {needed}: they do not share a tokenizer, and values "
            "would be of other texts. Train the reward model with the policy's tokenizer."
        )
    model.v_head.requires_grad_(False)
    for module in critic.modules():  # as in the policy, no pass is random
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.critic = critic.to(model.pretrained_model.get_input_embeddings().weight.device)
