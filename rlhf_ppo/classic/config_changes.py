"""A setting of `PPOConfig` that is changed after the trainer was built takes effect at the next step, or is refused."""

from pathlib import Path
from typing import Any

from rlhf_ppo.learner.arguments import fill_runtime_fields
from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.learner.importance_correction import check_ratio
from rlhf_ppo.learner.kl_controllers import AdaptiveKLController, FixedKLController

_NAMES_ONLY = {"exp_name", "task_name", "model_name", "query_dataset", "reward_model", "steps", "total_ppo_epochs"}
_READ_AT_EACH_STEP = {
    "remove_unused_columns", "push_to_hub_if_best_kwargs", "batch_size", "mini_batch_size", "ppo_epochs",
    "gradient_accumulation_steps", "max_grad_norm", "optimize_device_cache", "early_stopping", "target_kl",
    "compare_steps", "ratio_threshold", "use_score_scaling", "use_score_norm", "most_skips_in_a_row", "diagnose",
    "score_clip", "whiten_rewards", "output_dir", "importance_sampling_cap",
    "importance_sampling_level", "importance_sampling_floor", "token_budget",
}  # fmt: skip
OF_THE_ALGORITHM = {"cliprange", "cliprange_value", "vf_coef", "gamma", "lam", "ent_coef"}
"""Fields of `PPOConfig` that describe its own algorithm, `PPOConfig.algorithm()`."""
_OF_THE_KL = {"kl_penalty", "kl_placement"}
_OF_THE_CONTROLLER = {"adap_kl_ctrl", "init_kl_coef", "target", "horizon"}
_OLD_NAMES = {"forward_batch_size": "mini_batch_size", "optimize_cuda_cache": "optimize_device_cache"}
_OF_THE_SCORERS = {"temperature": "temperature", "logits_chunk_size": "chunk_size"}


def change_setting(trainer: Any, name: str) -> None:
    """Let a changed setting take effect.

    Raises:
        ValueError: It is read only when a trainer is built, or its value is wrong; the setting is put back then.
    """
    config, value = trainer.config, getattr(trainer.config, name)
    if name in ("mini_batch_size", "gradient_accumulation_steps", "batch_size", "steps"):
        config.derive_sizes()
        processes = trainer.accelerator.num_processes
        fill_runtime_fields(config, processes, trainer.is_encoder_decoder, bool(trainer.is_peft_model))
    elif name in _OLD_NAMES:
        setattr(config, _OLD_NAMES[name], value)
    elif name in OF_THE_ALGORITHM | _OF_THE_KL:
        _change_algorithm(trainer, name)
    elif name in _OF_THE_CONTROLLER:
        _change_controller(trainer, name)
    elif name in _OF_THE_SCORERS:
        for scorer in (trainer.policy, trainer._reference):
            if scorer is not None:
                setattr(trainer.accelerator.unwrap_model(scorer), _OF_THE_SCORERS[name], value)
    elif name == "learning_rate":
        _change_learning_rate(trainer)
    elif name == "dump_dir":
        trainer.dump_dir = None if config.dump_dir is None else Path(config.dump_dir)
    elif name == "importance_sampling":
        check_ratio(config.importance_sampling, trainer.algorithm_config)
    elif name == "reuse_logprobs":
        trainer.reuse.enabled = config.reuse_logprobs
    elif name in PPOConfig.__dataclass_fields__ and name not in _NAMES_ONLY | _READ_AT_EACH_STEP:
        raise ValueError(
            f"PPOConfig.{name} is read when the trainer is built: set to {value!r:.80} now, it would change "
            f"nothing. Set it before, or build the next trainer with dataclasses.replace(config, {name}=...)."
        )


def _change_algorithm(trainer: Any, name: str) -> None:
    if name in OF_THE_ALGORITHM and not trainer.uses_default_algorithm:
        raise ValueError(
            f"PPOConfig.{name} does not belong to this trainer's algorithm, which was passed as "
            f"{trainer.algorithm_config}: set here, it would change nothing. Build a trainer with another one."
        )
    if name == "kl_penalty" and not trainer.has_reference:
        raise ValueError(
            "kl_penalty was 'none' when the trainer was built, which therefore kept no reference: there is no KL to "
            "measure. Build the trainer with this kl_penalty."
        )
    with trainer.rebuilding():
        if name in OF_THE_ALGORITHM:
            trainer.algorithm_config = trainer.config.algorithm()
        trainer.build_algorithm()


def _change_controller(trainer: Any, name: str) -> None:
    if type(trainer.kl_ctl) not in (AdaptiveKLController, FixedKLController):
        raise ValueError(
            f"PPOConfig.{name} does not belong to trainer.kl_ctl, a {type(trainer.kl_ctl).__name__} of yours: set "
            "here, it would change nothing. Change trainer.kl_ctl."
        )
    controller = trainer.config.kl_controller()
    if name != "init_kl_coef":
        controller.value = trainer.kl_ctl.value
    trainer.kl_ctl = controller


def _change_learning_rate(trainer: Any) -> None:
    if not trainer.uses_default_optimizer or trainer.lr_scheduler is not None:
        raise ValueError(
            "PPOConfig.learning_rate belongs to the default optimizer without a scheduler, and this trainer has "
            "one of yours: set here, it would change nothing. Change the 'lr' of trainer.optimizer.param_groups."
        )
    trainer.optimizer.param_groups[0]["lr"] = trainer.config.learning_rate  # a second group has the critic's own rate
