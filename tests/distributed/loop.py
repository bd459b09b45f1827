"""The managed loop on several processes: whole, interrupted and resumed; or with one process that fails."""

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig

from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, TrainConfig
from rlhf_ppo.models import attach_critic_adapter
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.samplers.base import SamplingConfig
from tests.distributed.scenario import fsdp2, small_parameters_in_parts, whole_weights
from tests.support.tiny_models import EOS_TOKEN_ID, tiny_gpt2, tiny_tokenizer

TEXTS = ["The movie", "This film was", "I liked", "My morning began with", "What a story"]
SAMPLING = SamplingConfig(max_new_tokens=6, stop_token_ids=(EOS_TOKEN_ID,))


def share_of_e(prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float | None]:
    """A reward that a random policy can climb; process 1 leaves one sample out."""
    scores: list[float | None] = [response.count("e") / max(1, len(response)) for response in responses]
    return [None, *scores[1:]] if PartialState().process_index == 1 else scores


def skips_all_of_process_one(prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float | None]:
    """A reward source that leaves a process without any sample."""
    scores: list[float | None] = [float(len(response)) for response in responses]
    return [None] * len(scores) if PartialState().process_index == 1 else scores


def dies_on_process_one(prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float]:
    """As the kernel ends a process that takes too much memory: no error, no farewell."""
    if PartialState().process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.0] * len(responses)


def fails_on_process_one(prompts: Sequence[str], responses: Sequence[str], **_: Any) -> list[float]:
    """A reward source that breaks for one process only."""
    if PartialState().process_index == 1:
        raise RuntimeError("the reward model of process 1 has lost its connection")
    return [0.0] * len(responses)


def trainer(adapters: LoraConfig | None = None) -> PPOTrainer:
    """A tiny trainer with its prompts; with adapters, the critic is one too."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)  # of adapters and heads
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2(seed=0), peft_config=adapters)
    if adapters is not None:
        attach_critic_adapter(model)
    config = PPOConfig(batch_size=4, mini_batch_size=2, learning_rate=1e-3, ppo_epochs=2)
    return PPOTrainer(config, model, tokenizer=tokenizer, dataset=PromptDataset.from_texts(TEXTS, tokenizer))


def config(folder: Path) -> TrainConfig:
    """Four iterations with a checkpoint after each."""
    return TrainConfig(
        iterations=4, sampling=SAMPLING, output_dir=str(folder), save_every=1, eval_every=2, keep_best="score",
        progress=False,
    )  # fmt: skip


def unjudged(folder: Path) -> TrainConfig:
    """The same without evaluations, which would ask for held-out prompts."""
    return replace(config(folder), eval_every=0, keep_best=None)


def goes_on_with_another_number(folder: Path, *, done: int = 2) -> dict[str, Any]:
    """So many iterations were made by another number of processes; one more by this one."""
    own = trainer()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        own.train(share_of_e, replace(unjudged(folder), iterations=done))
        restored = whole_weights(own)
        moments = own.optimizer.state[own.optimizer.param_groups[0]["params"][0]]
        saved = {name: value.clone() for name, value in moments.items()}
        state = own.train(share_of_e, replace(unjudged(folder), iterations=done + 1))
    return {
        "restored": restored, "optimizer": saved, "weights": whole_weights(own), "history": state.history,
        "said": [str(each.message) for each in said],
    }  # fmt: skip


def main(folder: Path) -> None:
    """One run without and one with an interruption; every process saves what it ended with."""
    held_out = PromptDataset.from_texts(TEXTS, tiny_tokenizer())
    whole = trainer()
    whole.train(share_of_e, config(folder / "whole"), eval_prompts=held_out)
    trainer().train(
        share_of_e, config(folder / "resumed"), eval_prompts=held_out,
        # Only one process wants to stop: all must.
        callbacks=[lambda at, state: at.accelerator.process_index == 1 and state.iteration == 2],
    )  # fmt: skip
    resumed = trainer()
    state = resumed.train(share_of_e, config(folder / "resumed"), eval_prompts=held_out)
    found = resumed.evaluate(held_out, share_of_e, SAMPLING)
    ends = {"whole": whole_weights(whole), "resumed": whole_weights(resumed)}
    outcome = {**ends, "history": state.history, "prompts": found.prompts, "measures": found.measures}
    if (folder / "single").is_dir():
        outcome["grown"] = goes_on_with_another_number(folder / "single")
    torch.save(outcome, folder / f"{PartialState().process_index}.pt")


def adapted(folder: Path) -> None:
    """LoRA, whole and resumed, with rewards asked for by one process; every process saves what it ended with."""
    adapters = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    ends, first = {}, []
    for name, stops in {"whole": [None], "resumed": [1, None]}.items():
        for stop in stops:
            own = trainer(adapters)
            state = own.train(
                share_of_e, replace(unjudged(folder / f"lora-{name}"), iterations=2, reward_calls="once"),
                callbacks=[lambda _, state, stop=stop: state.iteration == stop],
            )  # fmt: skip
            first += [row["objective/kl"] for row in state.history if row is state.history[0]]
        ends[name] = whole_weights(own)
    torch.save({**ends, "first": first}, folder / f"lora-{PartialState().process_index}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "fail":
        trainer().train(fails_on_process_one, unjudged(Path(sys.argv[2])))
    elif sys.argv[1] == "die":
        skipping = trainer()
        skipping.train(skips_all_of_process_one, unjudged(Path(sys.argv[2])))
        torch.save(whole_weights(skipping), Path(sys.argv[2]) / f"{PartialState().process_index}.pt")
        with suppress(ValueError):  # on both processes, so that both can save
            trainer().train(lambda responses: [None] * len(responses), unjudged(Path(sys.argv[2]) / "lost"))
        skipping.accelerator.wait_for_everyone()
        trainer().train(dies_on_process_one, replace(unjudged(Path(sys.argv[2])), resume=False))
    else:
        here, stage = Path(sys.argv[2]), int(sys.argv[3])
        small_parameters_in_parts()
        main(here)
        if not stage:
            adapted(here)
            (here / "fsdp2").mkdir(exist_ok=True)
            with fsdp2():
                main(here / "fsdp2")
    PartialState().destroy_process_group()
