"""One side of the comparison, in a process of its own: reads commands, runs them, answers with what they cost.

    python -m tests.benchmarks.sides ours FOLDER

`tests.benchmarks.ppo` starts it with the Python of its environment. A command is a JSON list on standard input, the
answer a JSON object on standard output.
"""

import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.workloads import Task, Workload

PHASES = {"score": "time/ppo/forward_pass", "update": "time/ppo/optimize_step", "step": "time/ppo/total"}


class Side:
    """What the sides have in common: the same weights, the same batch, both as at the start before every step."""

    model: Any
    trainer: Any

    def __init__(self, task: Task, options: dict[str, Any]) -> None:
        self.task, self.workload, self.options = task, task.workload, options
        self.prompts, self.lengths = self.workload.prompts(), self.workload.lengths()
        self.scores = self.workload.scores()
        self.stats: dict[str, Any] = {}
        self.build()
        self.reset()

    def build(self) -> None:
        """Set `model` and `trainer`."""
        raise NotImplementedError

    def generate(self, rows_per_call: int | None = None) -> None:
        """Sample a response of the forced length to every prompt."""
        raise NotImplementedError

    def reshuffle(self) -> None:
        """Let the step draw the same minibatches again."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The classic configuration of this workload, everything else at its default."""
        workload = self.workload
        sizes = {"batch_size": workload.rows, "mini_batch_size": workload.minibatch, "ppo_epochs": workload.epochs}
        precision = {"accelerator_kwargs": {"mixed_precision": "bf16"}} if workload.dtype == "bfloat16" else {}
        return sizes | precision | self.options

    def autocast(self) -> torch.autocast:
        """The precision of generation."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.workload.dtype == "bfloat16")

    def reset(self, *, trim: bool = True) -> None:
        """Weights, optimizer and shuffles as at the start; with `trim` free memory, too."""
        from safetensors.torch import load_file

        weights = load_file(self.task.folder / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self.model.pretrained_model.named_parameters():
                parameter.copy_(weights[name])
        self.model.v_head.load_state_dict(self.task.value_head())
        getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer).state.clear()
        self.trainer.kl_ctl.value = self.trainer.config.init_kl_coef
        self.reshuffle()
        gc.collect()
        if trim and sys.platform.startswith("linux"):  # what the floor and the comparison took must not count as a peak
            getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)

    def step(self) -> dict[str, float]:
        """One PPO step on the task's responses; CPU seconds of its phases."""
        self.stats = self.learn()
        return {phase: float(self.stats[name]) for phase, name in PHASES.items()}

    def learn(self) -> dict[str, Any]:
        """The trainer's step; its statistics."""
        statistics: dict[str, Any] = self.trainer.step(self.prompts, self.task.responses, self.workload.scores())
        return statistics

    def save(self, path: str) -> None:
        """For the comparison: scalar statistics of the last step, log-probabilities, parameters after it."""
        scalars = {name: float(value) for name, value in self.stats.items() if getattr(value, "size", 1) == 1}
        parameters = {name: value.detach().float().cpu() for name, value in self.model.named_parameters()}
        torch.save({"statistics": scalars, "logprobs": self.logprobs(), "parameters": parameters}, path)

    def logprobs(self) -> Tensor:
        """Of the response tokens before the update, one row below the other."""
        padded, first = torch.as_tensor(self.stats["objective/logprobs"]), self.first_action()
        pairs = zip(padded, self.task.responses, strict=True)
        return torch.cat([row[first : first + len(response)] for row, response in pairs])

    def first_action(self) -> int:
        """The column of the first response token: the classic keeps a column for every prompt token but the first."""
        return self.workload.prompt - 1


class Ours(Side):
    """rlhf_ppo as its managed loop uses it: `learn` knows what the sampler found out on its way."""

    drawn: Any = None
    """The last draw of `generate`."""

    def build(self) -> None:
        from rlhf_ppo import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

        self.model = AutoModelForCausalLMWithValueHead.from_pretrained(str(self.task.folder))
        self.trainer = PPOTrainer(PPOConfig(**self.settings()), self.model, None, self.task.tokenizer())

    def generate(self, rows_per_call: int | None = None) -> None:
        from rlhf_ppo.samplers.base import SamplingConfig
        from rlhf_ppo.samplers.decode_loop import DecodeLoop

        config, generator = SamplingConfig(max_new_tokens=self.workload.cap), torch.Generator().manual_seed(3)
        with self.autocast():
            loop = DecodeLoop(**{} if rows_per_call is None else {"max_rows": rows_per_call})
            self.drawn = loop(self.model, self.prompts, config, generator=generator, limits=self.lengths)

    def learn(self) -> dict[str, Any]:
        statistics: dict[str, Any] = self.trainer.learn(self.responses())
        return statistics

    def prove(self) -> None:
        """What the first iteration of a run does once: compare the sampler's word with the policy's own pass."""
        self.generate()
        self.trainer.reuse(self.trainer.scorer, self.responses())

    def responses(self) -> Any:
        """The batch; with the sampler's word where its draws are those of the batch, as they are in float32."""
        from rlhf_ppo.batch import TokenInputs, pad_rows
        from rlhf_ppo.rollout.experience import Responses

        device, tokens = self.trainer.current_device, [row.tolist() for row in self.task.responses]
        responses = [response.to(device) for response in self.task.responses]
        told = {}
        if self.drawn is not None and [row.tolist() for row in self.drawn.responses] == tokens:
            told = {"sampler_logprobs": pad_rows(self.drawn.logprobs)}
            told |= {"sampler_values": pad_rows(self.drawn.values)} if self.drawn.values is not None else {}
        return Responses(
            inputs=TokenInputs(prompts=[prompt.to(device) for prompt in self.prompts], responses=responses),
            mask=pad_rows([torch.ones(len(row)) for row in tokens]).bool().to(device),
            scores=torch.stack(self.scores).to(device), **told,
        )  # fmt: skip

    def reshuffle(self) -> None:
        update = self.trainer.algorithm.update
        self.first_shuffle = getattr(self, "first_shuffle", update.state_dict())
        update.load_state_dict(self.first_shuffle)

    def first_action(self) -> int:
        return 0

    def work(self) -> dict[str, float]:
        """Counters of the last step, and whether the sampler's word was taken."""
        return {name: value for name, value in self.trainer.metrics.items() if name.startswith(("work/", "sampler/"))}

    def floor(self) -> dict[str, float]:
        """The step once more, and behind each of its optimizer steps the bare matrix products of just that one.

        A processor shared with others is faster and slower by the second; the two then see the same of it. Memory is
        as the iteration before left it, which is what all iterations of a run find but the first.

        Returns:
            Sums of `tests.benchmarks.floor.step_floor`; `update`: CPU seconds of the update between them.
        """
        from tests.benchmarks.floor import step_floor

        self.reset(trim=False)
        dtype = torch.bfloat16 if self.options.get("bf16") else torch.float32
        found = {"torch": 0.0, "fastest": 0.0, "attention": 0.0}
        beside = 0.0
        update: Any = self.trainer.algorithm.update
        step = update._step

        def and_its_floor(batch: Any, rows: Tensor, record: Any) -> None:
            nonlocal beside
            step(batch, rows, record)
            start = time.process_time()
            for name, products in step_floor(self.model.pretrained_model, self.workload, rows, dtype).items():
                found[name] += products
            beside += time.process_time() - start

        update._step = and_its_floor
        try:
            seconds = float(self.learn()[PHASES["update"]]) - beside
        finally:
            update._step = step
        return found | {"update": seconds}


class Plain(Ours):
    """rlhf_ppo without what is faster: see `tests.benchmarks.plain`."""

    def build(self) -> None:
        from rlhf_ppo import AutoModelForCausalLMWithValueHead
        from tests.benchmarks.plain import PlainTrainer, plain_config

        self.model = AutoModelForCausalLMWithValueHead.from_pretrained(str(self.task.folder))
        self.trainer = PlainTrainer(plain_config(**self.settings()), self.model, None, self.task.tokenizer())

    def generate(self, rows_per_call: int | None = None) -> None:
        ids = torch.stack(self.prompts).to(self.trainer.current_device)
        with self.autocast():
            self.model.generate(ids, attention_mask=torch.ones_like(ids), **generation_settings(self.workload))

    def first_action(self) -> int:
        return Side.first_action(self)

    def learn(self) -> dict[str, Any]:
        return Side.learn(self)


class Classic(Side):
    """TRL 0.11.4, its `generate` with the default of 4 prompts a call unless told otherwise."""

    def build(self) -> None:
        from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

        self.model = AutoModelForCausalLMWithValueHead.from_pretrained(str(self.task.folder))
        self.trainer = PPOTrainer(PPOConfig(**self.settings()), self.model, None, self.task.tokenizer())

    def generate(self, rows_per_call: int | None = None) -> None:
        size = {} if rows_per_call is None else {"batch_size": rows_per_call}
        settings = generation_settings(self.workload) | size
        with self.autocast():
            self.trainer.generate(self.prompts, return_prompt=False, remove_padding=False, **settings)

    def reshuffle(self) -> None:
        import numpy as np

        np.random.seed(self.trainer.config.seed)


class EndAt:
    """A stopping criterion of transformers: ends each row after its own number of new tokens, batch after batch."""

    def __init__(self, lengths: list[int], prompt: int) -> None:
        self.eos_token_id: list[int] = []  # generate pads finished rows only where a criterion has this name
        self.widths, self.first = torch.tensor(lengths) + prompt, 0

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        rows, width = input_ids.shape
        done = self.widths[self.first : self.first + rows].to(input_ids.device) <= width
        if bool(done.all()):
            self.first += rows  # the next call is of the next batch
        return done


def generation_settings(workload: Workload, *, do_sample: bool = True) -> dict[str, Any]:
    """Of transformers' `generate`: the whole vocabulary, responses of the forced lengths."""
    from transformers.generation.stopping_criteria import StoppingCriteriaList

    criteria: Any = [EndAt(workload.lengths(), workload.prompt)]
    filters = {"top_k": 0, "top_p": 1.0} if do_sample else {}
    return {
        "max_new_tokens": workload.cap, "do_sample": do_sample, "pad_token_id": 0, "eos_token_id": None,
        "stopping_criteria": StoppingCriteriaList(criteria), **filters,
    }  # fmt: skip


def cost(function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """CPU and wall seconds of a call, the highest resident memory in it, MiB, and what it answered."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    answer = function(*arguments) or {}
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        answer["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    return spent | {"peak_mib": memory("VmHWM")} | answer


def count_cpu_seconds(side: str) -> None:
    """Let the trainer's own clock, which times the phases of a step, count CPU seconds."""
    if side == "classic":
        import trl.trainer.ppo_trainer

        trl.trainer.ppo_trainer.time = SimpleNamespace(time=time.process_time)
    else:
        import rlhf_ppo.utils.timing

        rlhf_ppo.utils.timing.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]


def memory(name: str) -> float:
    """An entry of this process's status, MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def serve(kinds: Mapping[str, Callable[[Path, dict[str, Any]], Any]]) -> None:
    """Build the side that the command line names, then serve commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    name, folder, options = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    count_cpu_seconds(name)
    side = kinds[name](Path(folder), json.loads(options))
    print(json.dumps({"resident_mib": memory("VmRSS")}), file=answers, flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps(cost(getattr(side, command), *arguments)), file=answers, flush=True)


if __name__ == "__main__":
    serve(
        {
            "ours": lambda folder, options: Ours(Task.read(folder), options),
            "bf16": lambda folder, options: Ours(Task.read(folder), options),
            "plain": lambda folder, options: Plain(Task.read(folder), options),
            "classic": lambda folder, options: Classic(Task.read(folder), options),
        }
    )
