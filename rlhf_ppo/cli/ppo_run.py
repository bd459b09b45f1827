"""The run of `rlhf-ppo ppo`: model, prompts, reward, trainer, loop and report, from its settings."""

import contextlib
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, get_args

import transformers
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_ppo.algorithms.config import (
    GRPO,
    GSPO,
    RLOO,
    TRPO,
    AlgorithmConfig,
    PPOClip,
    PPOPenalty,
    Reinforce,
    ReinforcePlusPlus,
    critic_settings,
)
from rlhf_ppo.classic.config_changes import OF_THE_ALGORITHM
from rlhf_ppo.cli.run_config import RunConfig, refuse_unknown
from rlhf_ppo.cli.sections import build
from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.learner.optimizer import make_optimizer
from rlhf_ppo.loop.config import TrainConfig, TrainState
from rlhf_ppo.models.critic import SeparateCritic, attach_critic
from rlhf_ppo.models.pretrained import AutoModelForCausalLMWithValueHead
from rlhf_ppo.presets import PublishedRun, published_run
from rlhf_ppo.report import RunFolder, serve_report, write_report
from rlhf_ppo.report.run_data import read_run
from rlhf_ppo.report.summary import headline
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.make_sampler import SamplerName, default_importance_cap, make_sampler
from rlhf_ppo.trainer import PPOTrainer
from rlhf_ppo.updates.optimizers import linear_to_zero
from rlhf_ppo.utils.model_names import check_model_name

ALGORITHMS: dict[str, Callable[..., AlgorithmConfig]] = {
    "ppo-clip": PPOClip, "ppo-penalty": PPOPenalty, "trpo": TRPO, "reinforce": Reinforce,
    "reinforce++": ReinforcePlusPlus, "rloo": RLOO, "grpo": GRPO, "gspo": GSPO,
}  # fmt: skip
GROUP_SIZE = 8
"""Responses per prompt of algorithms that compare them, unless `sampling.num_return_sequences` is set."""


def run(config: RunConfig) -> TrainState:
    """Train and write the run folder; a ValueError for a setting that is unknown or does not fit."""
    ppo, train, algorithm = make_configs(config)
    transformers.utils.logging.disable_progress_bar()  # of loading
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )  # peft
    check_model_name(config.model)
    tokenizer = AutoTokenizer.from_pretrained(config.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    prompts = load_prompts(config.prompts, tokenizer, config.encoding)
    held_out = None if config.eval_prompts is None else load_prompts(config.eval_prompts, tokenizer, config.encoding)
    reward = None if config.reward is None else load_reward(config.reward)
    environment = None if config.environment is None else import_name(config.environment)
    trainer = make_trainer(config, ppo, train, algorithm, tokenizer)
    title = f"PPO on {config.model}"
    with contextlib.ExitStack() as served:
        if (config.live or config.live_address) and trainer.accelerator.is_main_process:
            url = served.enter_context(serve_report(config.output_dir, title=title, address=config.live_address))
            sys.stdout.write(f"live report: {url}\n")
        state = trainer.train(
            reward, train, prompts=prompts, eval_prompts=held_out, environment=environment,
            sampler=make_sampler(config.sampler, tokenizer),  # type: ignore[arg-type]
        )  # fmt: skip
    trainer.save_pretrained(f"{config.output_dir}/model")
    if trainer.accelerator.is_main_process:
        _write_results(config, ppo, train, algorithm, state, title=title)
    return state


def _write_results(
    config: RunConfig, ppo: PPOConfig, train: TrainConfig, algorithm: AlgorithmConfig, state: TrainState, *, title: str
) -> None:
    """Write settings and report; of a run that was finished before, leave its settings as they are, and say so."""
    folder = RunFolder.open(config.output_dir)
    sections: dict[str, Any] = {
        "ppo": ppo,
        "train": train,
        "sampling": train.sampling,
        "algorithm_config": algorithm,
    }
    was_finished = not state.metrics and state.stopped is None
    if not (was_finished and folder.config()):
        own = {name: value for name, value in asdict(config).items() if name not in sections}
        folder.write_config(own | {name: asdict(section) for name, section in sections.items()})
    page = write_report(config.output_dir, title=title)
    if was_finished:
        sys.stderr.write(
            f"Nothing was trained: {config.output_dir} holds a run of {state.iteration} iterations, which is finished. "
            "Choose another --output-dir, more --train.iterations, or --train.resume false to start anew.\n"
        )
    else:
        sys.stdout.write(f"{headline(read_run(folder))}\n")
    sys.stdout.write(f"model: {config.output_dir}/model\nreport: {page}\n")


SAVES = 25
"""Checkpoints of a run, unless `train.save_every` is set."""


def make_configs(config: RunConfig) -> tuple[PPOConfig, TrainConfig, AlgorithmConfig]:
    """Configurations of trainer, loop and algorithm: the preset's values, then those of the settings.

    Raises:
        ValueError: An unknown name, with the nearest one, or a value that its configuration refuses.
    """
    refuse_unknown([config.sampler], get_args(SamplerName), "sampler")
    for section, name in ("ppo", "output_dir"), ("train", "output_dir"), ("train", "sampling"):
        if name in getattr(config, section):
            raise ValueError(f"`{section}.{name}` is the setting `{name}` here: write it without `{section}`.")
    preset = None if config.preset is None else published_run(config.preset)
    ppo = {**({} if preset is None else preset.settings), **config.ppo}
    if ppo.get("importance_sampling", "auto") in ("auto", "truncate"):
        ppo.setdefault("importance_sampling_cap", default_importance_cap(config.sampler))  # type: ignore[arg-type]
    made: PPOConfig = build(PPOConfig, ppo, "ppo")
    algorithm = _make_algorithm(config, preset, made)
    group_size = GROUP_SIZE if isinstance(algorithm, RLOO | GRPO | GSPO) else 1
    sampling: dict[str, Any] = {"max_new_tokens": 64, "num_return_sequences": group_size}
    if preset is not None:
        known = {"num_return_sequences": preset.group_size, "max_new_tokens": preset.new_tokens}
        sampling |= {name: value for name, value in known.items() if value is not None}
    sampled = build(SamplingConfig, {"temperature": made.temperature} | sampling | config.sampling, "sampling")
    train: dict[str, Any] = {"output_dir": config.output_dir, "sampling": sampled}
    train |= {"iterations": made.total_ppo_epochs} if "steps" in ppo else {}
    train |= {} if preset is None else preset.train_settings(sampled.max_new_tokens)
    loop: TrainConfig = build(TrainConfig, train | config.train, "train")
    if "save_every" not in config.train:  # a run that is killed goes on, too
        loop = replace(loop, save_every=max(1, loop.iterations // SAVES))
    return made, loop, algorithm


def _make_algorithm(config: RunConfig, preset: PublishedRun | None, ppo: PPOConfig) -> AlgorithmConfig:
    """The algorithm, with the fields of `algorithm_config`; PPO-Clip begins with the classic fields of `ppo`."""
    name = config.algorithm or "ppo-clip"
    refuse_unknown([name], ALGORITHMS, "algorithm")
    own = None if preset is None else preset.algorithm
    if preset is not None and config.algorithm is not None and (own is not None or name != "ppo-clip"):
        raise ValueError(f"the preset {config.preset} brings its own algorithm, got {name} beside it: leave one out.")
    if own is None and name == "ppo-clip":
        return build(ppo.algorithm(), config.algorithm_config, "algorithm_config")  # type: ignore[no-any-return]
    start = ALGORITHMS[name] if own is None else own
    if ignored := sorted(OF_THE_ALGORITHM & config.ppo.keys()):
        raise ValueError(
            f"`ppo.{ignored[0]}` is read by ppo-clip alone, not by {config.preset or name}: set a field of "
            f"`algorithm_config` in its place ({', '.join(item.name for item in fields(start))})."  # type: ignore[arg-type]
        )
    return build(start, config.algorithm_config, "algorithm_config")  # type: ignore[no-any-return]


def make_trainer(
    config: RunConfig,
    ppo: PPOConfig,
    train: TrainConfig,
    algorithm: AlgorithmConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> PPOTrainer:
    """The trainer, with the separate critic and the schedule of the preset; says what the preset leaves out."""
    adapters = None
    if rank := config.lora_rank:
        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(config.model, peft_config=adapters)
    optimizer = schedule = None
    preset = None if config.preset is None else published_run(config.preset)
    if preset is not None and preset.separate_critic and policy.critic is None:
        attach_critic(policy, SeparateCritic.from_policy(policy))
    if preset is not None and preset.anneal:
        optimizer = make_optimizer(policy, ppo, None, critic_settings(algorithm))
        schedule = linear_to_zero(optimizer, train.iterations)
    trainer = PPOTrainer(
        ppo, policy, None, tokenizer, optimizer=optimizer, lr_scheduler=schedule, algorithm=algorithm
    )  # fmt: skip
    if preset is not None and preset.remarks and trainer.accelerator.is_main_process:
        sys.stderr.write(f"preset {config.preset}: {preset.remarks}\n")
    return trainer


def load_prompts(source: str, tokenizer: PreTrainedTokenizerBase, encoding: str | None = None) -> PromptDataset | int:
    """Prompts of a file, folder or hub dataset, or a number of episodes.

    Raises:
        ValueError: The source is missing, empty or holds a row that cannot be read.
    """
    if source.isdigit() and encoding is None:
        return int(source)
    if not source:
        raise ValueError(
            "--prompts is missing: name a file, folder or dataset with a column `prompt`, e.g. prompts.jsonl."
        )
    read = importlib.import_module("reward_model.data.prompts").read_prompts
    return PromptDataset(read(source, encoding), tokenizer)


def load_reward(choice: str) -> Callable[..., Any]:
    """A function by import path, the reward model of a folder or hub name, or the client of a server."""
    if choice.startswith(("http://", "https://")):
        client = importlib.import_module("reward_model.serving.client").RemoteRewardModel
        reward = client(choice, token=os.environ.get("REWARD_MODEL_TOKEN"))
    elif ":" in choice:
        reward = import_name(choice)
    else:
        reward = importlib.import_module("reward_model.models.ensemble").load_reward_model(choice)
    return reward  # type: ignore[no-any-return]


def import_name(path: str) -> Any:
    """What `module:name` or `file.py:name` names; a ValueError if there is no such module, file or name."""
    place, _, name = path.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, name)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        raise ValueError(f"{path} cannot be imported ({error}): write module:name or file.py:name.") from error
