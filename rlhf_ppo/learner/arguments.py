"""Check the arguments of `PPOTrainer`, and build the accelerator from its configuration."""

import os
import warnings
from typing import Any, cast

import datasets
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau
from transformers import PreTrainedTokenizerBase

from rlhf_ppo.distributed.deepspeed import accelerator_arguments, keep_torch_optimizer
from rlhf_ppo.distributed.fsdp import enable_fsdp2_on_cpu
from rlhf_ppo.distributed.shutdown import wait_for_gloo_threads
from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.learner.trackers import check_tracker
from rlhf_ppo.models import PreTrainedModelWrapper
from rlhf_ppo.models.loading import check_transformers_adapters
from rlhf_ppo.models.precision import MIXED, Precision, accelerate_device, choose_precision, requested_precision
from rlhf_ppo.models.trunk import learned_positions
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.updates.pretraining import PretrainingMix


def check_arguments(
    config: object, model: object, ref_model: object, tokenizer: object, dataset: object, lr_scheduler: object
) -> None:
    """Raise a ValueError for the first argument of `PPOTrainer` of a wrong type; nothing has been moved by then."""
    if not isinstance(config, PPOConfig):
        raise ValueError(f"config must be a PPOConfig, got {type(config)}")
    config.check()  # fields may have been set since it was built
    if config.push_to_hub_if_best_kwargs and "repo_id" not in config.push_to_hub_if_best_kwargs:
        raise ValueError(
            "You have to specify repo_id in order to push the model to the hub! Got push_to_hub_if_best_kwargs = "
            f"{config.push_to_hub_if_best_kwargs}: add {{'repo_id': 'user/name'}}."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            "tokenizer must be a PreTrainedTokenizerBase like a PreTrainedTokenizer or a PreTrainedTokenizerFast, "
            f"got {type(tokenizer)}"
        )
    check_models(config, model, ref_model)
    if dataset is not None and not isinstance(dataset, torch.utils.data.Dataset | datasets.Dataset | PromptDataset):
        raise ValueError(f"dataset must be a torch.utils.data.Dataset or datasets.Dataset, got {type(dataset)}")
    check_scheduler(lr_scheduler)
    if config.use_score_norm and not config.use_score_scaling:
        warnings.warn(
            "use_score_norm=True does nothing without use_score_scaling=True, as in TRL's classic: scores stay as they "
            "are. Set both, or neither.", UserWarning, stacklevel=3,
        )  # fmt: skip


def check_models(config: PPOConfig, model: object, ref_model: object) -> None:
    """Raise a ValueError unless policy and reference are two wrappers."""
    if not isinstance(model, PreTrainedModelWrapper):
        raise ValueError(
            f"model must be a PreTrainedModelWrapper, got {type(model)} - wrap it: "
            "`AutoModelForCausalLMWithValueHead.from_pretrained(model)`"
        )
    if ref_model is not None and not isinstance(ref_model, PreTrainedModelWrapper):
        raise ValueError(f"ref_model must be a PreTrainedModelWrapper or `None`, got {type(ref_model)}")
    if ref_model is not None and config.kl_penalty == "none":
        raise ValueError(
            "expected no ref_model with kl_penalty='none', got one: no KL is measured, so it would never be read. Pass "
            "ref_model=None, or choose kl_penalty='kl'."
        )
    if ref_model is model:
        raise ValueError(
            "model and ref_model are the same object: the reference would move with the policy and the KL penalty "
            "would always be 0. Pass `ref_model=None` for a frozen copy."
        )
    check_parts(model, ref_model)


def check_parts(model: PreTrainedModelWrapper, ref_model: PreTrainedModelWrapper | None) -> None:
    """Check that the language model is trained, whole, and neither larger than its reference nor a part of it.

    Raises:
        ValueError: No parameter of the language model is trained, an adapter was added behind the wrapper's back, the
            reference has fewer token embeddings, or holds trained parameters.
    """
    language_model: Any = model.pretrained_model
    trained = {id(parameter) for parameter in language_model.parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError(
            f"expected a policy that can learn, got {type(language_model).__name__} without a trained parameter: the "
            "value head alone would be trained. An adapter from a folder is frozen unless you load it with "
            "`from_pretrained(folder, is_trainable=True)`; elsewhere call `model.requires_grad_(True)`."
        )
    check_transformers_adapters(language_model)
    if ref_model is None:
        return
    sizes = [part.pretrained_model.get_input_embeddings().weight.shape[0] for part in (model, ref_model)]
    if 0 < sizes[1] < sizes[0]:
        raise ValueError(
            f"expected a ref_model with the policy's {sizes[0]} token embeddings, got {sizes[1]}: it could not read "
            "the added tokens. Resize both (`resize_token_embeddings`), or pass `ref_model=None` for a copy."
        )
    if any(id(parameter) in trained for parameter in ref_model.pretrained_model.parameters()):
        raise ValueError(
            "expected a ref_model of its own, got one around the language model that is trained (PEFT puts adapters "
            "into the model it is given): the reference would move with the policy, and the KL would always be 0. Load "
            "the reference a second time, or pass `ref_model=None`."
        )


def check_pretraining(model: PreTrainedModelWrapper, mix: PretrainingMix | None) -> None:
    """Raise a ValueError for a pretraining text that the model cannot read: it would end the run in its update."""
    language_model = model.pretrained_model
    vocab_size = getattr(language_model.config.get_text_config(decoder=True), "vocab_size", None)
    positions = learned_positions(language_model)
    for index, text in enumerate(() if mix is None else mix.texts):
        lowest, highest = int(text.min()), int(text.max())
        has_ids = lowest >= 0 and (vocab_size is None or highest < vocab_size)
        if not has_ids or (positions is not None and len(text) > positions):
            raise ValueError(
                f"expected pretraining texts of token ids below {vocab_size} and of at most {positions} tokens, got "
                f"texts[{index}] with ids from {lowest} to {highest} and {len(text)} tokens: the model cannot read it. "
                "Tokenize with the model's own tokenizer, and divide long texts."
            )


def check_shared_layers(config: PPOConfig, model: PreTrainedModelWrapper, num_shared_layers: int | None) -> None:
    """Raise a ValueError for shared layers without a copied reference to share them with."""
    if num_shared_layers is not None and (config.kl_penalty == "none" or model.is_peft_model):
        found = "kl_penalty='none'" if config.kl_penalty == "none" else "a policy with adapters, its own reference"
        raise ValueError(
            f"expected no num_shared_layers with {found}, got {num_shared_layers}: no reference is copied, so the "
            "layers would be neither shared nor frozen. Leave it at None, and call `requires_grad_(False)` on layers "
            "to freeze them."
        )


def check_optimizer(model: torch.nn.Module, optimizer: Optimizer | None) -> None:
    """Check that a given optimizer holds the model's parameters; warn where it lacks the value head's or the critic's.

    Raises:
        ValueError: It holds none of them.
    """
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained and not any(id(parameter) in held for parameter in trained.values()):
        raise ValueError(
            f"expected an optimizer over the model's parameters, got one over {len(held)} tensors of another model: no "
            "weight of the policy would move. Build it from `model.parameters()` of the model that you pass."
        )
    missing = [name for name in trained if name.startswith(("v_head", "critic")) and id(trained[name]) not in held]
    if missing:
        warnings.warn(
            f"The optimizer does not hold the value head or critic ({', '.join(missing[:4])}): its values stay as they "
            "are. Attach a critic, then build it from `model.parameters()`.", UserWarning, stacklevel=4,
        )  # fmt: skip


def check_scheduler(lr_scheduler: object) -> None:
    """Raise ValueError if it is neither None nor a scheduler that is stepped without a metric."""
    if lr_scheduler is not None and not isinstance(lr_scheduler, LRScheduler):
        raise ValueError(f"lr_scheduler must be a torch.optim.lr_scheduler.LRScheduler, got {type(lr_scheduler)}")
    if isinstance(lr_scheduler, ReduceLROnPlateau):
        raise ValueError(
            "lr_scheduler must be one that needs no metric, got ReduceLROnPlateau: it is stepped once per step(), and "
            "would raise after the weights have moved. Step it yourself with a metric of your choice."
        )


def check_schedule_goes_on(lr_scheduler: Any) -> None:
    """Raise ValueError if the scheduler would refuse its next step, before the weights move."""
    if isinstance(lr_scheduler, OneCycleLR) and lr_scheduler.last_epoch >= lr_scheduler.total_steps:
        raise ValueError(
            f"expected a scheduler with a step left, got OneCycleLR after all its {lr_scheduler.total_steps} steps: it "
            "would raise after the weights have moved. Build it with total_steps = number of PPO steps."
        )


def make_accelerator(config: PPOConfig, *, float32_only: bool = False) -> tuple[Accelerator, Precision]:
    """Build the `Accelerator` of a configuration (processes, precision, trackers), and its precision policy.

    Args:
        float32_only: Whether the algorithm works in float32 alone.

    Raises:
        ValueError: Accelerate would divide gradients a second time, FSDP or DeepSpeed have unsupported settings,
            settings of the precision contradict each other, or the tracker is not installed.
    """
    arguments = dict(accelerator_arguments(cast("dict[str, Any]", config.accelerator_kwargs)))
    project = dict(cast("dict[str, Any]", config.project_kwargs))
    if "logging_dir" in arguments:  # where Accelerate's argument was up to TRL 0.4
        project.setdefault("logging_dir", arguments.pop("logging_dir"))
    device = accelerate_device(cpu=bool(arguments.get("cpu")))
    mixed = _mixed_precision(arguments)
    float32_only |= _has_engine(arguments)  # which casts as its launch file says
    name = requested_precision(
        config.precision, bf16=config.bf16, mixed_precision=mixed, device=device, float32_only=float32_only
    )
    precision = choose_precision(name, device, autocast_on_cpu=mixed not in (None, "no"))
    if precision.autocast is not None and not AcceleratorState._shared_state:
        arguments = {**arguments, "mixed_precision": MIXED[precision.autocast]}
    check_tracker(config.log_with, cast("dict[str, Any]", config.tracker_kwargs), project)
    accelerator = Accelerator(
        log_with=config.log_with,
        project_config=ProjectConfiguration(**project),
        **arguments,
    )
    if precision.autocast == torch.float16 and accelerator.device.type == "cuda" and accelerator.scaler is None:
        raise ValueError(
            "expected an Accelerate without a precision for float16, got one set up before in this process with "
            f"mixed_precision={accelerator.mixed_precision!r}: gradients would not be scaled, and the small ones lost. "
            "Call AcceleratorState._reset_state() first, or use precision='float32'."
        )
    if precision.tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    if accelerator.device.type == "cuda" or precision.compute != torch.float32:
        accelerator.print(precision)
    keep_torch_optimizer(accelerator)
    if accelerator.num_processes > 1:
        wait_for_gloo_threads()
    settings = config.accelerator_kwargs
    enable_fsdp2_on_cpu(accelerator, settings.get("fsdp_plugin") if isinstance(settings, dict) else None)
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"Accelerate's gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}: gradients would "
            "be divided by it once more. Set it to 1 there, and `PPOConfig.gradient_accumulation_steps` to your number."
        )
    return accelerator, precision


def _has_engine(arguments: dict[str, Any]) -> bool:
    """Whether DeepSpeed or FSDP will hold the weights."""
    named = any(arguments.get(name) for name in ("deepspeed_plugin", "fsdp_plugin"))
    return named or any(
        os.environ.get(name, "").lower() == "true" for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
    )


def _mixed_precision(arguments: dict[str, Any]) -> str | None:
    """Accelerate's precision, where a script or a launch file sets it; None where not, or where it only says "no".

    `accelerate launch` says "no" whenever its file does not mention a precision.
    """
    if arguments.get("mixed_precision") is not None:
        return str(arguments["mixed_precision"])
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    set_before = AcceleratorState().mixed_precision if AcceleratorState._shared_state else launched
    return None if set_before == "no" else set_before


def fill_runtime_fields(config: PPOConfig, processes: int, is_encoder_decoder: bool, is_peft_model: bool) -> None:
    """Set the fields of `config` that depend on the number of processes and the type of the model."""
    vars(config).update(  # not by assignment: those are a script's
        world_size=processes,
        global_batch_size=config.batch_size * processes,
        global_backward_batch_size=(config.backward_batch_size or config.mini_batch_size) * processes,
        is_encoder_decoder=is_encoder_decoder,
        is_peft_model=is_peft_model,
    )
