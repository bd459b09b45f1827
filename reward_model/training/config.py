"""The settings of one training run."""

from dataclasses import dataclass, field
from typing import Literal

from rlhf_ppo.utils.field_types import check_fields


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """Settings of reward-model training: model, texts, loss, optimizer, evaluation."""

    model: str
    """Folder or hub name: a causal LM, an encoder, or a classifier."""
    output_dir: str
    """Folder of the reward model; it is made when training has succeeded."""
    overwrite: bool = False
    """Whether an existing output folder may be replaced."""
    seed: int = 0
    """Seed of all random numbers, of head and data order among them."""

    template: Literal["auto", "plain", "chat"] = "auto"
    """How prompt and response are joined; auto is chat for conversations and plain for text."""
    append_eos: bool | None = None
    """Whether the end-of-text token is appended to each text; None: for plain text, if the tokenizer has one."""
    max_length: int = 1024
    """Maximum tokens of a text; longer rows are dropped and counted."""

    epochs: float = 1.0
    """Passes over the training pairs."""
    learning_rate: float = 1e-5
    """Peak of the schedule. 3e-6 to 1e-5 suits models of a billion parameters, 1e-4 to 1e-3 those of a few million."""
    schedule: str = "linear"
    """Learning-rate schedule of transformers, such as cosine."""
    schedule_arguments: list[str] = field(default_factory=list)
    """Arguments of the schedule: name=value, such as num_cycles=2 for cosine_with_restarts."""
    warmup: float = 0.05
    """Share of the steps that warm up; constant and plateau schedules have none."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    batch_size: int = 64
    """Comparisons per optimizer step, over all processes."""
    micro_batch_size: int | None = None
    """Comparisons per forward pass and process; None: batch_size / number of processes."""
    max_grad_norm: float = 1.0
    """Maximum global norm of the gradient, to which it is clipped."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the forward pass; auto is bfloat16 on GPUs that have it. Weights stay float32."""
    attn_implementation: str | None = None
    """Attention of transformers: eager, sdpa, flash_attention_2, ...; None: its choice. Only sdpa can be packed."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass; less memory, about a fifth more time."""
    packing: bool = True
    """On a CPU, run texts of unequal length packed instead of padded, if the model computes the same."""
    fast_products: bool = True
    """On a CPU, compute float32 matrix products by oneDNN where it is clearly faster than torch's own."""
    trust_remote_code: bool = False
    """Whether code that comes with the model may run."""

    label_smoothing: float = 0.0
    """Assumed share of flipped labels."""
    centering: float = 0.0
    """Weight of the penalty on (r_chosen + r_rejected)^2; 0.01 is usual."""
    tie_strength: float = 1.0
    """Davidson's nu, used if the data has ties: two equal completions tie with probability nu / (2 + nu)."""
    margin_scale: float = 1.0
    """Factor on the margin column."""

    lora_rank: int = 0
    """Rank of LoRA adapters on all linear layers, 0 for none."""
    lora_alpha: int = 32
    """Scale of the adapters, which are multiplied by alpha / rank."""
    merge_adapter: bool = True
    """Whether adapters are merged into the weights at the end, or saved as an adapter."""

    evaluations: int = 1
    """Held-out evaluations during training, evenly spaced; the last one is at the end."""
    early_stop_patience: int = 0
    """Evaluations without a better accuracy before it stops; 0: never. The best is kept."""
    resume: bool = False
    """Continue from the last checkpoint of an interrupted run; output folder, data and model must be the same."""
    checkpoints: int = 0
    """Checkpoints during training, evenly spaced, for --resume."""
    trackers: str = "none"
    """Comma-separated, of tensorboard, wandb, mlflow, trackio, ...; metrics.jsonl is always written."""
    progress: bool = True
    """Whether to show progress bars."""
    log_every: int = 10
    """Optimizer steps between two logged losses."""

    def __post_init__(self) -> None:
        check_fields(self)
        positive = ("epochs", "learning_rate", "batch_size", "max_length", "max_grad_norm", "tie_strength", "log_every")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)!r}.")
        shares = ("label_smoothing", "warmup")
        for name in shares:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)!r}.")
        if self.label_smoothing >= 0.5:
            raise ValueError(f"label_smoothing must be < 0.5, got {self.label_smoothing}: above, worse becomes better.")
        counts = ("seed", "lora_rank", "evaluations", "early_stop_patience", "checkpoints", "centering", "weight_decay")
        for name in counts:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)!r}.")
        if self.early_stop_patience and self.evaluations < 2:
            raise ValueError(
                f"early_stop_patience={self.early_stop_patience} compares evaluations, but evaluations="
                f"{self.evaluations}: it could never stop. Set evaluations to 5 or more."
            )

    def accumulation(self, processes: int) -> tuple[int, int]:
        """(Comparisons per forward pass and process, passes per step); a ValueError if batch_size does not divide."""
        micro = self.micro_batch_size or max(1, self.batch_size // processes)
        if self.batch_size % (micro * processes):
            raise ValueError(
                f"batch_size={self.batch_size} cannot be divided evenly by {processes} processes x micro_batch_size="
                f"{micro}: processes would see unequal shares. Set batch_size to a multiple of {micro * processes}."
            )
        return micro, self.batch_size // (micro * processes)
