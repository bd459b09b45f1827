"""What is measured: model shapes, prompts and forced response lengths, all made from fixed seeds.

Imported in both environments, ours and the other library's: torch and transformers only.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SPREAD = 0.8  # standard deviation of the logarithm of log-normal lengths


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One PPO iteration on a random model."""

    name: str
    vocab: int
    layers: int = 6
    width: int = 384
    heads: int = 6
    inner: int = 1024
    """Width of the feed-forward layers."""
    rows: int = 32
    prompt: int = 64
    """Tokens of every prompt."""
    cap: int = 128
    """Longest response."""
    lengths_are: str = "log-normal"
    """"log-normal" of about `mean`, cut at `cap`; "even", from a sixth of `cap` to `cap`; "full": all `cap`."""
    mean: float = 42.0
    minibatch: int = 8
    """Rows of one optimizer step."""
    epochs: int = 4
    dtype: str = "float32"
    """Of the products; "bfloat16" keeps weights in float32 and runs under autocast."""
    model_type: str = "llama"

    def lengths(self) -> list[int]:
        """Response lengths: quantiles of their distribution, shuffled."""
        quantiles = (torch.arange(self.rows) + 0.5) / self.rows
        if self.lengths_are == "full":
            lengths = torch.full((self.rows,), self.cap)
        elif self.lengths_are == "even":
            lengths = torch.linspace(self.cap // 6, self.cap, self.rows).round().long()
        else:
            log_normal = torch.distributions.LogNormal(math.log(self.mean) - SPREAD**2 / 2, SPREAD)
            lengths = log_normal.icdf(quantiles).round().clamp(1, self.cap).long()
        found: list[int] = lengths[torch.randperm(self.rows, generator=torch.Generator().manual_seed(0))].tolist()
        return found

    def model_config(self) -> dict[str, Any]:
        """Of a Llama of this shape."""
        return {
            "vocab_size": self.vocab, "num_hidden_layers": self.layers, "hidden_size": self.width,
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads, "intermediate_size": self.inner,
            "max_position_embeddings": max(1024, self.prompt + self.cap), "tie_word_embeddings": True,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
        }  # fmt: skip

    def model(self) -> Any:
        """The random model, in float32: llama, or gpt2 (whose feed-forward layers are 4 times as wide)."""
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        if self.model_type == "llama":
            return LlamaForCausalLM(LlamaConfig(**self.model_config())).eval()
        config = GPT2Config(
            vocab_size=self.vocab, n_layer=self.layers, n_head=self.heads, n_embd=self.width,
            n_positions=max(1024, self.prompt + self.cap), bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()

    def prompts(self) -> list[Tensor]:
        """Random prompts, [prompt] each."""
        generator = torch.Generator().manual_seed(1)
        return list(torch.randint(1, self.vocab, (self.rows, self.prompt), generator=generator))

    def scores(self) -> list[Tensor]:
        """One score a response."""
        return list(torch.randn(self.rows, generator=torch.Generator().manual_seed(2)))


SKEW = Workload(name="cpu-skew", vocab=32_000)
WORKLOADS = {
    "cpu-skew": SKEW,
    "cpu-full": replace(SKEW, name="cpu-full", lengths_are="full"),
    "cpu-vocab": replace(SKEW, name="cpu-vocab", vocab=128_000, layers=4, width=256, heads=4, inner=688),
    # Pairs: prompts with two responses each; at most eight pairs an optimizer step.
    "rm-pairs": replace(SKEW, name="rm-pairs", cap=512, mean=100.0, epochs=1),
    "tiny": replace(SKEW, name="tiny", vocab=300, layers=1, width=16, heads=2, inner=32, epochs=2),
}
"""`tiny` has the lengths of cpu-skew, for tests."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A workload on disk, where every side reads the same weights and the same batch."""

    workload: Workload
    folder: Path
    responses: Sequence[Tensor]

    @classmethod
    def write(
        cls, workload: Workload, folder: Path, responses: Sequence[Tensor], value_head: dict[str, Tensor]
    ) -> "Task":
        """Lay down everything but the model, which stands in `folder` already."""
        (folder / "workload.json").write_text(json.dumps(asdict(workload)), encoding="utf-8")
        torch.save({"responses": list(responses), "value_head": value_head}, folder / "task.pt")
        return cls(workload=workload, folder=folder, responses=responses)

    @classmethod
    def read(cls, folder: Path) -> "Task":
        """What `write` laid down."""
        workload = Workload(**json.loads((folder / "workload.json").read_text(encoding="utf-8")))
        return cls(workload=workload, folder=folder, responses=torch.load(folder / "task.pt")["responses"])

    def value_head(self) -> dict[str, Tensor]:
        """Weights of the value head, which is no part of the model."""
        weights: dict[str, Tensor] = torch.load(self.folder / "task.pt")["value_head"]
        return weights

    def tokenizer(self) -> Any:
        """A tokenizer that pads with token 0, on the right: the only side on which TRL's positions are right."""
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        inner = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<eos>"))
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", padding_side="right"
        )
