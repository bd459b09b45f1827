"""The run of `rlhf-ppo ppo`: model, prompts, reward, trainer, loop and report, from its settings."""

import contextlib
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
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
)
from rlhf_ppo.cli.run_config import RunConfig, refuse_unknown
from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.loop.config import TrainConfig, TrainState
from rlhf_ppo.models.pretrained import AutoModelForCausalLMWithValueHead
from rlhf_ppo.presets import published_run
from rlhf_ppo.report import RunFolder, serve_report, write_report
from rlhf_ppo.report.run_data import read_run
from rlhf_ppo.report.summary import headline
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from rlhf_ppo.samplers.make_sampler import SamplerName, default_importance_cap, make_sampler
from rlhf_ppo.trainer import PPOTrainer
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
    trainer = PPOTrainer(ppo, _policy(config), None, tokenizer, algorithm=algorithm)
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
        page = write_report(config.output_dir, title=title)
        result = headline(read_run(RunFolder.open(config.output_dir)))
        sys.stdout.write(f"{result}\nmodel: {config.output_dir}/model\nreport: {page}\n")
    return state


SAVES = 25
"""Checkpoints of a run, unless `train.save_every` is set."""


def make_configs(config: RunConfig) -> tuple[PPOConfig, TrainConfig, AlgorithmConfig]:
    """Configurations of trainer, loop and algorithm: the preset's values, then those of the settings.

    Raises:
        ValueError: An unknown name, with the nearest one, or a value that its configuration refuses.
    """
    refuse_unknown([config.algorithm], ALGORITHMS, "algorithm")
    refuse_unknown([config.sampler], get_args(SamplerName), "sampler")
    preset = None if config.preset is None else published_run(config.preset)
    algorithm = _make(ALGORITHMS[config.algorithm], config.algorithm_config, "algorithm_config")
    if preset is not None and preset.algorithm is not None:
        algorithm = replace(preset.algorithm, **config.algorithm_config)
    group_size = GROUP_SIZE if isinstance(algorithm, RLOO | GRPO | GSPO) else 1
    ppo = {"importance_sampling_cap": default_importance_cap(config.sampler)}  # type: ignore[arg-type]
    sampling: dict[str, Any] = {"max_new_tokens": 64, "num_return_sequences": group_size}
    train: dict[str, Any] = {"output_dir": config.output_dir}
    if preset is not None:
        ppo |= preset.settings
        known = {"num_return_sequences": preset.group_size, "max_new_tokens": preset.new_tokens}
        sampling |= {name: value for name, value in known.items() if value is not None}
        train |= {"missing_eos": preset.missing_eos}
    made = _make(PPOConfig, ppo | config.ppo, "ppo")
    sampled = _make(SamplingConfig, {"temperature": made.temperature} | sampling | config.sampling, "sampling")
    loop: TrainConfig = _make(TrainConfig, train | {"sampling": sampled} | config.train, "train")
    if "save_every" not in config.train:  # a run that is killed goes on, too
        loop = replace(loop, save_every=max(1, loop.iterations // SAVES))
    return made, loop, algorithm


def _make(kind: Callable[..., Any], values: Mapping[str, Any], section: str) -> Any:
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    refuse_unknown(values, known, f"field of `{section}`")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"`{section}` does not fit: {error}") from error


def _policy(config: RunConfig) -> AutoModelForCausalLMWithValueHead:
    adapters = None
    if rank := config.lora_rank:
        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return AutoModelForCausalLMWithValueHead.from_pretrained(config.model, peft_config=adapters)


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
