"""A language model as a policy over tokens: (prompts, responses) -> log-probabilities, values, entropy.

Only what a loss reads is computed: rows are trimmed to the longest of the batch, the LM head runs on response tokens
only, one chunk of logits at a time. The same module scores rollouts and updates, policy and reference.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from rlhf_ppo.batch import PolicyOutput, TokenInputs, pad_rows
from rlhf_ppo.functional import TokenStatistics, categorical_metric, chunked_categorical_kl, chunked_token_statistics
from rlhf_ppo.functional.trust_region import FisherMetric
from rlhf_ppo.kernels.chunk_sizes import rows_per_chunk
from rlhf_ppo.kernels.fused_linear_logprobs import fused_token_statistics
from rlhf_ppo.kernels.linear_layers import is_plain_head, tied_embedding_gradient
from rlhf_ppo.kernels.linear_logprobs import LossGradient
from rlhf_ppo.kernels.tied_embedding import TiedGradient
from rlhf_ppo.models.fast_paths import prove_fast_paths
from rlhf_ppo.models.lm_head import Head, OldPolicyStates, lm_head
from rlhf_ppo.models.pretrained import PreTrainedModelWrapper
from rlhf_ppo.models.row_check import RowCheck
from rlhf_ppo.models.second_derivatives import check_twice_differentiable
from rlhf_ppo.models.trunk import FastPaths, Trunk


class TokenPolicy(nn.Module):
    """The policy of a language model, with values if the model has a value head.

    Args:
        model: A value-head wrapper, or a plain language model (values are then zero). Causal, or an encoder-decoder:
            its encoder reads the prompt, its decoder the response after a start token.
        temperature: Divides the logits before the softmax, in rollout and update alike (Ziegler et al. 2019).
        chunk_size: Largest number of response tokens whose [chunk, vocabulary] logits are in memory at once.
        packing: Skip positions whose output is unused: pack rows instead of padding them, and run the last layer only
            from a prompt's last token on.
        fused_head: Let `forward` compute the LM head's gradients while it has the logits, given `loss_gradient`.

    Fast paths are used where they give what the model's own call gives: see `paths`.
    """

    def __init__(
        self,
        model: PreTrainedModelWrapper | PreTrainedModel,
        *,
        temperature: float = 1.0,
        chunk_size: int = 1024,
        packing: bool = False,
        fused_head: bool = True,
    ) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        """Class names of the layers, which FSDP shards one by one."""
        self.temperature = temperature
        self.chunk_size = chunk_size
        self.fused_head = fused_head
        self.fused_scoring = fused_head
        """Use the fused kernel without gradient, too: in policy and reference alike, or equal models would differ."""
        self.packing = packing
        self.proven: FastPaths | None = None  # see `paths`
        self._row_check = RowCheck()
        self.trunk = Trunk()
        self.checkpointing = False
        """Gradient checkpointing. Layers do it in training mode only, so all dropout must be 0."""

    @property
    def paths(self) -> FastPaths:
        """The fast paths in force, proved on the model at their first use; ValueError if it is no policy of tokens."""
        if self.proven is None:
            wanted = FastPaths(packing=self.packing, last_layer=self.packing, fused_head=self.fused_head)
            self.proven = prove_fast_paths(self.language_model, wanted, self._score_by, temperature=self.temperature)
        return self.proven

    def _score_by(
        self, paths: FastPaths, inputs: TokenInputs, loss_gradient: LossGradient | None = None
    ) -> tuple[Tensor, Tensor, TokenStatistics]:
        before, self.proven = self.proven, paths
        counts, self.trunk.work = self.trunk.work, Counter()  # a trial's work is not the policy's
        try:
            return self._run(inputs, False, loss_gradient)
        finally:
            self.proven, self.trunk.work = before, counts

    @property
    def work(self) -> Counter[str]:
        """Deterministic counters of tokens and rows, summed until the caller clears them."""
        return self.trunk.work

    def forward(
        self,
        inputs: TokenInputs,
        *,
        with_entropy: bool = False,
        reference: "TokenPolicy | None" = None,
        loss_gradient: LossGradient | None = None,
        old: OldPolicyStates | None = None,
    ) -> PolicyOutput:
        """Score every response token of `inputs` in one pass over the shared trunk.

        Args:
            inputs: B prompts with their responses, on the device of the model.
            with_entropy: Also compute the full-vocabulary entropy; costs one more pass over each chunk of logits.
            loss_gradient: dL/d log π and dL/d entropy per token, if known: the LM head then computes its gradients
                in this pass, while it has the logits.
            reference: Also compute the exact KL to it, which takes another pass without gradient.
            old: Also compute the exact KL from it.

        Returns:
            Log-probabilities and entropy [B, T], values [B, T+1], zero beyond each row's end.
        """
        # Without dropout the first pass of an update has probability ratio 1 exactly.
        self.model.train(self.checkpointing and torch.is_grad_enabled())
        if not (torch.is_grad_enabled() and self.paths.fused_head and is_plain_head(self._linear_head())):
            loss_gradient = None
        if self._row_check.is_due(self.model, inputs):
            self.proven = self._row_check(self.model, self.paths, inputs, self._score_by, autocast=self.trunk.autocast)
        hidden, states, statistics = self._run(inputs, with_entropy, loss_gradient)
        self.work["head_rows"] += len(hidden)
        lengths = inputs.response_lengths().tolist()
        rows = list(self._values(states).split([length + 1 for length in lengths]))
        critic = self.separate_critic
        entropy = statistics.entropy
        return PolicyOutput(
            logprobs=pad_rows(statistics.logprobs.split(lengths)),
            values=pad_rows(rows if critic is None else critic(inputs)),
            entropy=None if entropy is None else pad_rows(entropy.split(lengths)),
            reference_kl=None if reference is None else self._kl_to(reference, inputs, hidden),
            old_kl=None if old is None else self._kl_from(old, inputs, hidden),
        )

    def _run(
        self, inputs: TokenInputs, with_entropy: bool, loss_gradient: LossGradient | None
    ) -> tuple[Tensor, Tensor, TokenStatistics]:
        """The LM head's and the value head's inputs, and the statistics of all response tokens."""
        with nullcontext() if loss_gradient is None else tied_embedding_gradient(self.language_model) as tied:
            hidden, states = self._hidden(inputs)
        tokens = torch.cat(list(inputs.responses))
        return hidden, states, self._statistics(hidden, tokens, with_entropy, loss_gradient, tied)

    def _statistics(
        self, hidden: Tensor, tokens: Tensor, with_entropy: bool, loss_gradient: LossGradient | None,
        tied: TiedGradient | None,
    ) -> TokenStatistics:  # fmt: skip
        linear = self._linear_head()
        settings: dict[str, Any] = {"with_entropy": with_entropy}
        scores = self.fused_scoring and not torch.is_grad_enabled() and is_plain_head(linear)
        if linear is not None and (loss_gradient is not None or scores):
            settings |= {"matmul_dtype": getattr(linear, "matmul_dtype", None) or self.trunk.head_dtype}
            settings |= {"loss_gradient": loss_gradient, "chunk_size": self.chunk_size, "tied_gradient": tied}
            settings["temperature"] = self.temperature / self.paths.transform.scale
            return fused_token_statistics(hidden, linear.weight, linear.bias, tokens, **settings)
        vocab = (
            hidden.shape[-1] if not self.paths.head_rows else self.language_model.config.get_text_config().vocab_size
        )
        rows = rows_per_chunk(self.chunk_size, vocab, hidden.device)
        settings |= {"temperature": self.temperature, "chunk_size": rows}
        return chunked_token_statistics(self._head(), hidden, tokens, **settings)

    @torch.no_grad()
    def snapshot(self, inputs: TokenInputs) -> Float[Tensor, "batch time hidden"]:
        """Current hidden states at each response token, for an `OldPolicyStates`."""
        self.model.eval()
        rows = self._hidden(inputs)[0].split(inputs.response_lengths().tolist())
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

    def copy_head(self) -> Head:
        """A copy of the current LM head, for an `OldPolicyStates`."""
        return self._head(copied=True)

    def kl_to(self, reference: "TokenPolicy", inputs: TokenInputs) -> Float[Tensor, "batch time"]:
        """Exact KL(π || reference) over the full vocabulary at each response token, nats, [B, T]."""
        return self._kl_to(reference, inputs, self._hidden(inputs)[0])

    def check_twice_differentiable(self) -> None:
        """Raise ValueError if the forward pass cannot be differentiated twice."""
        check_twice_differentiable(self.model, self.language_model, autocast=self.trunk.autocast)

    def outputs_and_metric(
        self, inputs: TokenInputs, weights: Float[Tensor, "batch time"]
    ) -> tuple[tuple[Float[Tensor, "actions vocab"]], FisherMetric]:
        """Logits of every response token, twice differentiable, and their Fisher metric.

        Fused attention has no second derivative, so this pass runs PyTorch's math kernel.

        Args:
            inputs: A micro-batch whose [actions, vocabulary] logits fit into memory several times.
            weights: Weight of each response token in the metric.
        """
        self.model.eval()
        with sdpa_kernel(SDPBackend.MATH):
            hidden, _ = self._hidden(inputs)
            logits = self._head()(hidden).float() / self.temperature
        pairs = zip(weights, inputs.response_lengths().tolist(), strict=True)
        return (logits,), categorical_metric(logits, torch.cat([row[:length] for row, length in pairs]))

    @torch.no_grad()
    def kl_from_current(self, micro_batches: Sequence[TokenInputs]) -> list[Callable[[], Float[Tensor, "batch time"]]]:
        """For each micro-batch, a function that returns the exact KL(π at this call || π at its call), nats."""
        self.model.eval()
        trained = (weight.requires_grad for weight in self.language_model.get_output_embeddings().parameters())
        head = self._head(copied=any(trained))

        def kl_function(inputs: TokenInputs, states: Tensor) -> Callable[[], Tensor]:
            def measure() -> Tensor:
                self.model.eval()
                return self._kl(head, states, self._head(), self._hidden(inputs)[0], inputs)

            return measure

        return [kl_function(inputs, self._hidden(inputs)[0]) for inputs in micro_batches]

    @property
    def config(self) -> Any:
        """Config of the language model; DeepSpeed derives its buffer sizes from it."""
        return self.language_model.config

    def critic_parameters(self) -> list[nn.Parameter]:
        """Parameters of the value head, or of the separate critic."""
        if self.separate_critic is not None:
            return list(self.separate_critic.parameters())
        return list(self.model.v_head.parameters()) if isinstance(self.model, PreTrainedModelWrapper) else []

    @property
    def separate_critic(self) -> nn.Module | None:
        """The separate critic; None if values come from the shared trunk."""
        return self.model.critic if isinstance(self.model, PreTrainedModelWrapper) else None

    def critic_values(self, inputs: TokenInputs) -> list[Float[Tensor, " actions"]]:
        """V(s_0) ... V(s_{T-1}) of each row from the separate critic, with gradient."""
        if self.separate_critic is None:
            raise ValueError("expected a separate critic, got none: values come from the trunk, see `critic_states`")
        return [row[:-1] for row in self.separate_critic(inputs)]

    def critic_states(self, inputs: TokenInputs) -> list[Float[Tensor, "actions hidden"]]:
        """Inputs of the value head for V(s_0) ... V(s_{T-1}), one tensor per row."""
        self.model.eval()
        _, states = self._hidden(inputs)
        return [row[:-1] for row in states.split([length + 1 for length in inputs.response_lengths().tolist()])]

    def values_from_states(self, states: Float[Tensor, "actions hidden"]) -> Float[Tensor, " actions"]:
        """V at the concatenated states of `critic_states`."""
        return self._values(states)

    def _kl_to(self, reference: "TokenPolicy", inputs: TokenInputs, hidden: Tensor) -> Float[Tensor, "batch time"]:
        with torch.no_grad():
            reference.model.eval()
            ref, _ = reference._hidden(inputs)
        return self._kl(self._head(), hidden, reference._head(), ref, inputs)

    def _kl_from(self, old: OldPolicyStates, inputs: TokenInputs, hidden: Tensor) -> Float[Tensor, "batch time"]:
        lengths = inputs.response_lengths().tolist()
        states = torch.cat([row[:length] for row, length in zip(old.states, lengths, strict=True)])
        return self._kl(old.head, states, self._head(), hidden, inputs)

    def _kl(self, head: Head, states: Tensor, other: Head, other_states: Tensor, inputs: TokenInputs) -> Tensor:
        settings: Any = {"temperature": self.temperature, "chunk_size": self.chunk_size}
        kl = chunked_categorical_kl(head, states, other, other_states, **settings)
        return pad_rows(kl.split(inputs.response_lengths().tolist()))

    @property
    def language_model(self) -> Any:
        """The causal model or encoder-decoder itself, adapters included, without its value head."""
        model = self.model
        language_model = model.pretrained_model if isinstance(model, PreTrainedModelWrapper) else model
        # PEFT injects its layers into the base model, so the base model is the adapted policy.
        return language_model.get_base_model() if isinstance(language_model, PeftModel) else language_model

    def _hidden(self, inputs: TokenInputs) -> tuple[Float[Tensor, "actions features"], Float[Tensor, "states hidden"]]:
        return self.trunk(self.language_model, inputs, self.paths)

    def has_plain_head(self) -> bool:
        """Whether the fused kernel supports the LM head."""
        return is_plain_head(self.language_model.get_output_embeddings())

    def _linear_head(self) -> nn.Linear | None:
        """The LM head as a linear layer; None where it is none, or a soft cap follows it."""
        head = self.language_model.get_output_embeddings() if self.paths.head_rows else None
        return head if isinstance(head, nn.Linear) and self.paths.transform.softcap is None else None

    def _head(self, *, copied: bool = False) -> Head:
        if not self.paths.head_rows:
            return nn.Identity()
        return self.trunk.in_compute_dtype(lm_head(self.language_model, self.paths.transform, copied=copied))

    def _values(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, " rows"]:
        if not isinstance(self.model, PreTrainedModelWrapper):
            return hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
        values: Tensor = self.model.v_head(hidden).squeeze(-1).float()
        return values
