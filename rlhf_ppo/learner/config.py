"""`PPOConfig`, the settings of `PPOTrainer`: the fields of TRL's classic, then those of this package."""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from weakref import WeakMethod

from rlhf_ppo.algorithms import GAE, Critic, PPOClip
from rlhf_ppo.distributed.placement import ReferencePlacement
from rlhf_ppo.functional import ImportanceLevel
from rlhf_ppo.learner.argument_names import keep_argument_names_apart
from rlhf_ppo.learner.config_checks import check_settings, check_sizes, parse_json_object
from rlhf_ppo.learner.importance_correction import ImportanceMode
from rlhf_ppo.learner.kl_controllers import AdaptiveKLController, FixedKLController, KLController
from rlhf_ppo.models.precision import PrecisionName
from rlhf_ppo.rollout.kl_placement import KLPenalty, KLPlacement
from rlhf_ppo.updates import MinibatchConfig


@dataclass
class PPOConfig:
    """Settings of `PPOTrainer`; batch sizes are per process.

    The fields and defaults are those of TRL's classic `PPOConfig` (<= 0.11.4), so that its scripts keep their meaning.
    A field that does not exist cannot be set: a misspelt name raises an error.
    """

    exp_name: str = Path(sys.argv[0]).stem or "rlhf_ppo"
    """Name of the experiment."""
    seed: int = 0
    """Seed of Python, NumPy, torch and the minibatch shuffles."""
    log_with: str | None = None
    """Tracker of Accelerate: "tensorboard", "wandb", "trackio", ...; None: none."""
    task_name: str | None = None
    """Only passed to trackers."""
    model_name: str = "gpt2"
    """Only for trackers and scripts."""
    query_dataset: str = "stanfordnlp/imdb"
    """Only for trackers and scripts."""
    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"
    """Only for trackers and scripts."""
    remove_unused_columns: bool = True
    """Drop the dataset's columns, except arguments of the model's forward and `label`, `query` and `response`."""
    # Bare `dict`: tyro then takes JSON for it, as HfArgumentParser does.
    tracker_kwargs: dict | str | None = field(default_factory=dict)  # type: ignore[type-arg]
    """Passed to the tracker as `init_kwargs`; JSON on a command line."""
    accelerator_kwargs: dict | str | None = field(default_factory=dict)  # type: ignore[type-arg]
    """Passed to `Accelerator`; JSON on a command line."""
    project_kwargs: dict | str | None = field(default_factory=dict)  # type: ignore[type-arg]
    """Passed to `ProjectConfiguration`, e.g. `logging_dir`; JSON on a command line."""
    tracker_project_name: str = "rlhf_ppo"
    """Project name given to the tracker."""
    push_to_hub_if_best_kwargs: dict | str | None = field(default_factory=dict)  # type: ignore[type-arg]
    """With `repo_id`: `step()` pushes the model whenever the mean score is the best; JSON on a command line."""
    steps: int = 20000
    """Number of episodes on each process; `total_ppo_epochs` = ceil(steps / batch_size) calls of `step()`."""
    learning_rate: float = 1.41e-5
    """Learning rate of the default optimizer."""
    adap_kl_ctrl: bool = True
    """Adapt the coefficient of the KL to the reference (Ziegler et al. 2019); otherwise it is fixed."""
    init_kl_coef: float = 0.2
    """Initial coefficient of the KL penalty in the reward."""
    kl_penalty: KLPenalty = "kl"
    """Estimate of KL(policy || reference) per token. "kl": the log-ratio; "abs": its absolute value; "mse": half its
    square; "full": the exact KL over the vocabulary; "k3": exp(-log-ratio) - 1 + log-ratio; "none" (with
    `init_kl_coef=0`): no KL and no reference model, which saves memory and a forward pass."""
    target: float = 6.0
    """Target of the adaptive controller: KL per response, nats."""
    horizon: float = 10000.0
    """Time scale of the adaptive controller, episodes: a larger value changes the coefficient more slowly."""
    gamma: float = 1.0
    """Discount factor γ."""
    lam: float = 0.95
    """λ of generalized advantage estimation."""
    cliprange: float = 0.2
    """ε of the clipped surrogate."""
    cliprange_value: float = 0.2
    """How far a value may move from the old one before its loss is clipped."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    batch_size: int = 128
    """Responses per `step()` and process."""
    forward_batch_size: int | None = None
    """Deprecated name of `mini_batch_size`."""
    mini_batch_size: int = 128
    """Responses per forward and backward pass, on each process."""
    gradient_accumulation_steps: int = 1
    """Passes per optimizer step. The loss is the mean over all tokens of the step, however they are divided."""
    world_size: int | None = None
    """Set by the trainer: number of processes."""
    ppo_epochs: int = 4
    """Passes over each batch."""
    max_grad_norm: float | None = None
    """Gradient norm to which gradients are clipped in every optimizer step; None: no clipping."""
    optimize_cuda_cache: bool | None = None
    """Deprecated name of `optimize_device_cache`."""
    optimize_device_cache: bool = False
    """Empty the device's cache around `step()`."""
    early_stopping: bool = False
    """Stop the epochs when the policy's KL to the old policy exceeds 1.5 x `target_kl`."""
    target_kl: float = 1.0
    """KL for `early_stopping`, nats per token."""
    compare_steps: int = 1
    """Steps between two comparisons with the best mean score (`push_to_hub_if_best_kwargs`)."""
    ratio_threshold: float = 10.0
    """Minibatches whose mean probability ratio exceeds this are skipped, without an optimizer step."""
    use_score_scaling: bool = False
    """Divide scores by the running standard deviation of a response's total."""
    use_score_norm: bool = False
    """With `use_score_scaling`: also subtract the running mean, once per response."""
    score_clip: float | None = None
    """Clip the total score of a response to [-score_clip, score_clip]."""
    whiten_rewards: bool = False
    """Scale shaped rewards to variance 1, keeping their mean, before advantages are estimated."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time. On a GPU it is switched on if a row does not
    fit otherwise, unless `token_budget` is set."""
    is_encoder_decoder: bool | None = None
    """Set by the trainer."""
    is_peft_model: bool | None = None
    """Set by the trainer."""
    backward_batch_size: int | None = None
    """Derived: mini_batch_size x gradient_accumulation_steps, the responses of one optimizer step on each process."""
    global_backward_batch_size: int | None = None
    """Set by the trainer: sum over all processes."""
    global_batch_size: int | None = None
    """Set by the trainer: sum over all processes."""
    dataset_num_proc: int | None = None
    """Only for scripts: columns are dropped without further processes."""
    total_ppo_epochs: int | None = None
    """Derived: ceil(steps / batch_size)."""

    most_skips_in_a_row: int = 5
    """Stop the run after this many successive minibatches whose loss or gradient is not finite; all are skipped."""
    dump_dir: str | None = None
    """Folder for the dump that `most_skips_in_a_row` writes, for `python -m rlhf_ppo.replay`; None: the run folder."""
    diagnose: bool = True
    """Run the doctor on the first batch and log its warnings (`PPOTrainer.diagnose`)."""
    output_dir: str | None = None
    """Run folder of `train()` where `TrainConfig.output_dir` is None; None: nothing is written."""
    ent_coef: float = 0.0
    """Weight of the exact full-vocabulary entropy in the loss."""
    kl_placement: KLPlacement = "reward"
    """Where the KL to the reference is subtracted: in the reward, in the loss, or "split" over both. "split" puts the
    exact KL of each state into the loss, and the KL of later states into the reward. The coefficient has the same
    meaning in all three. The exception is GRPO, which divides advantages by the standard deviation of a group."""
    reference_placement: ReferencePlacement = "auto"
    """Where the reference model is between scoring passes: "whole" on the device; "sharded" over processes (ZeRO-3,
    FSDP); "offloaded" to the CPU; "auto": sharded if the policy is sharded, else whole."""
    temperature: float = 1.0
    """Divisor of the logits in rollout, reference and update."""
    importance_sampling: ImportanceMode = "auto"
    """Correction for tokens that were sampled from another distribution. w is the trainer's probability of a token
    divided by the sampler's. "truncate" multiplies the policy loss by min(w, cap). "mask" multiplies it by w, or by 0
    if w is outside [floor, cap] (IcePop). "bypass" uses the sampler's probabilities as the old policy in PPO's ratio.
    "auto" truncates if a cap is set or the sampler is known to differ."""
    importance_sampling_level: ImportanceLevel = "token"
    """Which ratio w is. "token": that of each token; "sequence": that of the whole response; "geometric": the
    geometric mean of the token ratios of the response."""
    importance_sampling_floor: float | None = None
    """Smallest w that "mask" and "bypass" keep; None: 0.5 for "mask", none for "bypass"."""
    importance_sampling_cap: float | None = None
    """Largest w, >= 1; None: 2 to truncate, 5 for "mask", none for "bypass"."""
    token_budget: int | None = None
    """Largest number of tokens per forward and backward pass, padding included. A pass also has at most
    `mini_batch_size` rows. None on a CPU: no limit. None on a GPU: as many tokens as its free memory holds at the first
    step; no limit if processes shard the model."""
    kv_budget_gib: float | None = None
    """Largest KV cache of the default sampler and of `generate`, GiB; None: half of a GPU's free memory, 4 on a CPU."""
    logits_chunk_size: int = 1024
    """Largest number of response tokens whose logits over the vocabulary are in memory at once."""
    optimizer: Literal["adam", "adamw", "adamw_8bit", "adam_tensorflow"] = "adam"
    """The default optimizer. "adamw" has a weight decay of 0.01. "adamw_8bit" has 8-bit moments, and needs CUDA and
    bitsandbytes. "adam_tensorflow" places ε as TensorFlow does, which makes the first steps smaller."""
    adam_eps: float = 1e-8
    """ε of the default optimizer."""
    fused_adam: bool = True
    """Use torch's fused Adam as the default optimizer. Its results are equal up to rounding, and it takes less time."""

    packing: bool = True
    """Pack rows of unequal length in place of padding them, and leave out the prompt's tokens but the last in the last
    layer. Both are used only if a check on the model finds the same results."""
    fused_head: bool = True
    """Compute the LM head's gradients chunk by chunk in the forward pass, while the logits are in memory."""
    precision: PrecisionName = "auto"
    """Precision of matrix products: "float32", "bf16" or "fp16"; trained weights, norms, softmaxes and losses stay
    float32. "auto": bf16 on a GPU that has it, fp16 on an older one, float32 on a CPU."""
    bf16: bool = False
    """The same as `precision="bf16"`. On CPUs without AVX-512-BF16 or AMX, matrix products stay in float32."""
    reuse_logprobs: bool = True
    """In `train()`: use the sampler's log-probabilities and values in place of a scoring pass, if the first rollout
    shows that they are equal."""
    keep_freed_memory: bool = True
    """On CPUs: the process keeps the memory of freed tensors. Returning it to the system and getting new pages would
    cost time."""
    fast_products: bool = True
    """On CPUs: compute float32 matrix products with oneDNN if it is faster than torch, and use RMSNorm and SwiGLU that
    save fewer tensors for the backward pass. Results are equal up to rounding."""

    def __post_init__(self) -> None:
        for name in ("tracker_kwargs", "accelerator_kwargs", "project_kwargs", "push_to_hub_if_best_kwargs"):
            value = getattr(self, name)
            setattr(self, name, parse_json_object(name, value) if isinstance(value, str) else value or {})
        if self.forward_batch_size is not None:
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            self.optimize_device_cache = self.optimize_cuda_cache
        self.check()

    def check(self) -> None:
        """Check the settings, one by one and the sizes together, and set the derived fields."""
        check_settings(self)
        check_sizes(self)
        self.derive_sizes()

    def derive_sizes(self) -> None:
        """Set the derived fields: `backward_batch_size` and `total_ppo_epochs`."""
        vars(self)["backward_batch_size"] = self.mini_batch_size * self.gradient_accumulation_steps
        vars(self)["total_ppo_epochs"] = math.ceil(self.steps / self.batch_size)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self.__dataclass_fields__:
            raise AttributeError(
                f"PPOConfig has no setting {name!r}; its settings are {', '.join(sorted(self.__dataclass_fields__))}"
            )
        old = self.__dict__.get(name)
        super().__setattr__(name, value)
        if "_listeners" not in vars(self) or value == old:
            return
        try:
            check_settings(self)
            self.announce(name)
        except BaseException:
            vars(self)[name] = old
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_listeners"}

    def notify(self, changed: Callable[[str], None]) -> None:
        """Call a method with the name of every field that is set from now on; if it raises, the field is put back.

        Args:
            changed: A bound method; its object may be freed.
        """
        vars(self)["_listeners"] = (*vars(self).get("_listeners", ()), WeakMethod(changed))

    def announce(self, name: str) -> None:
        """Call the methods of `notify`: the field `name` was set."""
        for listener in vars(self).get("_listeners", ()):
            if (changed := listener()) is not None:
                changed(name)

    def algorithm(self) -> PPOClip:
        """The algorithm that the classic fields describe: PPO with the clipped surrogate."""
        return PPOClip(
            clip_low=self.cliprange, clip_high=self.cliprange, ent_coef=self.ent_coef,
            gae=GAE(gamma=self.gamma, lam=self.lam),
            critic=Critic(vf_coef=self.vf_coef, clip_range_value=self.cliprange_value),
        )  # fmt: skip

    def minibatch(self) -> MinibatchConfig:
        """Settings of the update: epochs, minibatch and micro-batch sizes, clipping, early stopping."""
        return MinibatchConfig(
            epochs=self.ppo_epochs, minibatch_size=self.mini_batch_size * self.gradient_accumulation_steps,
            micro_batch_size=self.mini_batch_size, token_budget=self.token_budget, max_grad_norm=self.max_grad_norm,
            ratio_threshold=self.ratio_threshold, most_skips_in_a_row=self.most_skips_in_a_row,
            target_kl=self.target_kl if self.early_stopping else None,
        )  # fmt: skip

    @property
    def kv_budget_bytes(self) -> int | None:
        """`kv_budget_gib` in bytes."""
        return None if self.kv_budget_gib is None else int(self.kv_budget_gib * 2**30)

    def kl_controller(self) -> KLController:
        """Build the controller of the KL coefficient: adaptive or fixed."""
        if self.adap_kl_ctrl:
            return AdaptiveKLController(self.init_kl_coef, self.target, self.horizon)
        return FixedKLController(self.init_kl_coef)

    def to_dict(self) -> dict[str, Any]:
        """All settings as one flat dictionary; nested keys are joined by "/"."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                flat.update({f"{name}/{key}": item for key, item in value.items()})
            else:
                flat[name] = value
        return flat


keep_argument_names_apart(PPOConfig)
