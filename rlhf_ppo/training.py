"""The managed loop: prompts -> responses -> scores -> `learn`, with evaluation, checkpoints and early stop."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from tqdm.auto import tqdm

from rlhf_ppo.evaluation import Evaluation, evaluate
from rlhf_ppo.metrics import scalars
from rlhf_ppo.report.run_folder import RunFolder
from rlhf_ppo.resume import restore_checkpoint, save_checkpoint
from rlhf_ppo.rollout.collect import Collected, Collector, MissingEOS
from rlhf_ppo.rollout.decoding import DecodeLoop
from rlhf_ppo.rollout.prompts import PromptDataset, PromptSampler
from rlhf_ppo.rollout.reward_sources import Scores, Sources
from rlhf_ppo.rollout.sampling import Sampler, SamplingConfig
from rlhf_ppo.signals import StopRequest, stop_on_signals
from rlhf_ppo.traces import token_traces

if TYPE_CHECKING:
    import rlhf_ppo.trainer


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `PPOTrainer.train`."""

    iterations: int = 100
    """Rollouts, each of `PPOConfig.batch_size` responses a process."""
    sampling: SamplingConfig
    """How responses are drawn; its temperature must be that of `PPOConfig`."""
    output_dir: str | None = None
    """Run folder; None: nothing is written."""
    eval_every: int = 0
    """Evaluate on the held-out prompts every so many iterations; 0: never inside the loop."""
    save_every: int = 0
    """Checkpoint every so many iterations; 0: only when the loop is stopped from outside."""
    keep_last: int = 2
    """Checkpoints kept."""
    keep_best: str | None = None
    """Measure of the held-out evaluation, e.g. "score": its best model is kept in `best/`. None: none is."""
    max_kl: float | None = None
    """KL budget, nats a response: stop when a rollout exceeds it, and never keep a "best" model beyond it."""
    missing_eos: MissingEOS | None = None
    """What a response costs that ran to `max_new_tokens` without a stop token; None: nothing."""
    max_time: float | None = None
    """Seconds after which the loop checkpoints and stops."""
    resume: bool = True
    """Go on from the newest whole checkpoint in `output_dir`."""
    progress: bool = True
    """Show a progress bar on the main process."""

    def __post_init__(self) -> None:
        for name in ("iterations", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig.{name} must be at least 1, got {getattr(self, name)}")
        if self.keep_best is not None and not self.eval_every:
            raise ValueError("keep_best needs held-out evaluations to compare: set eval_every")


@dataclass(kw_only=True)
class TrainState:
    """Where the loop stands; what callbacks see."""

    iteration: int = 0
    """Iterations finished."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last iteration."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Of all iterations of this call."""
    evaluation: Evaluation | None = None
    """The newest."""
    best: float | None = None
    """Best held-out mean of `keep_best` so far."""
    stopped: str | None = None
    """Why the loop ended before its last iteration."""


Callback: TypeAlias = Callable[["rlhf_ppo.trainer.PPOTrainer", TrainState], object]
"""Called after every iteration; returning True stops the loop."""


@dataclass
class TrainingLoop:
    """One call of `PPOTrainer.train`: wiring in the order of the data.

    Args:
        trainer: Whose `learn` is the optimisation step.
        prompts: What is answered.
        rewards: Who scores the answers.
        config: How long, how often, where to.
        eval_prompts: Held-out prompts.
        judges: Further sources for the held-out evaluation, which the policy is not rewarded by.
        callbacks: Called after every iteration.
        sampler: Who draws responses; None: the own decode loop.
    """

    trainer: "rlhf_ppo.trainer.PPOTrainer"
    prompts: PromptDataset
    rewards: Sources
    config: TrainConfig
    eval_prompts: PromptDataset | None = None
    judges: Sources | None = None
    callbacks: Sequence[Callback] = ()
    sampler: Sampler | None = None

    def __post_init__(self) -> None:
        trainer, sampling = self.trainer, self.config.sampling
        _check_tokenizer(trainer)
        if str(trainer.accelerator.distributed_type).endswith("FSDP"):
            raise ValueError(
                "train() does not run under FSDP: a rollout and a checkpoint would see parts of each parameter. "
                "Launch with DDP or DeepSpeed ZeRO (recipes/launch), or write your own loop around step()."
            )
        if sampling.temperature != trainer.config.temperature:
            raise ValueError(
                f"sampling.temperature is {sampling.temperature}, PPOConfig.temperature {trainer.config.temperature}: "
                "probability ratios and KL would be those of another distribution. Give both the same value."
            )
        if trainer.config.batch_size % sampling.num_return_sequences:
            raise ValueError(
                f"batch_size {trainer.config.batch_size} must be a multiple of num_return_sequences "
                f"{sampling.num_return_sequences}: a prompt's responses stand in one batch"
            )
        if trainer.algorithm.needs_groups and sampling.num_return_sequences < 2:
            raise ValueError("this algorithm compares responses to one prompt: set num_return_sequences to 2 or more")
        accelerator, seed = trainer.accelerator, trainer.config.seed
        self.collector = Collector(
            model=trainer.model, tokenizer=trainer.tokenizer, sampling=sampling, device=trainer.current_device,
            sampler=self.sampler or DecodeLoop(trainer.tokenizer),
        )  # fmt: skip
        self.generator = torch.Generator(device="cpu").manual_seed(seed + 100003 * accelerator.process_index)
        self.order = PromptSampler(
            len(self.prompts), batch_size=trainer.config.batch_size // sampling.num_return_sequences, seed=seed,
            rank=accelerator.process_index, world_size=accelerator.num_processes,
        )  # fmt: skip
        self.folder = None if self.config.output_dir is None else RunFolder.create(self.config.output_dir)
        self.state = TrainState()
        self.newest: tuple[Collected, Scores] | None = None

    def run(self) -> TrainState:
        """Iterate until the budget, a callback, a guard or a signal says stop."""
        if self.config.resume and self.folder is not None:
            restore_checkpoint(self, self.folder.path)
        deadline = None if self.config.max_time is None else time.monotonic() + self.config.max_time
        bar = tqdm(
            total=self.config.iterations, initial=self.state.iteration, desc="PPO", unit="it",
            disable=not (self.config.progress and self.trainer.accelerator.is_main_process),
        )  # fmt: skip
        with bar, stop_on_signals() as request:
            while self.state.iteration < self.config.iterations and self.state.stopped is None:
                self._iterate()
                bar.update()
                bar.set_postfix(_postfix(self.state.metrics))
                self._after_iteration(request, deadline)
        return self.state

    def _iterate(self) -> None:
        trainer = self.trainer
        start = time.perf_counter()
        with trainer.whole_parameters():
            collected = self.collector.draw(self.prompts.batch(next(self.order)), self.generator)
        generated = time.perf_counter()
        scores = self.collector.score(collected, self.rewards, self.config.missing_eos)
        scored = time.perf_counter()
        statistics = trainer.learn(self.collector.responses(collected.samples, scores))
        self.newest = collected, scores
        self.state.iteration += 1
        first, *others = trainer.processes.gather_objects([scores])
        everyones: Scores = first.joined(others)
        finished = trainer.processes.gather_objects(collected.samples.finished)
        metrics = scalars(statistics) | trainer.metrics | everyones.metrics()
        metrics |= {
            "env/reward_mean": float(everyones.total[~everyones.skipped].mean()),
            "tokens/finished_share": sum(finished) / len(finished),
            "time/generate": generated - start,
            "time/reward": scored - generated,
            "time/iteration": time.perf_counter() - start,
        }
        self.state.metrics = metrics
        self.state.history.append(metrics)

    def _record(self) -> None:
        trainer, metrics = self.trainer, self.state.metrics
        trainer.current_step = self.state.iteration
        trainer._track(metrics)
        if self.folder is not None and trainer.accelerator.is_main_process:
            self.folder.append_metrics(self.state.iteration, metrics)

    def evaluate(self, *, seed: int = 0) -> Evaluation:
        """Answer the held-out prompts with the policy as it is; every process takes its share."""
        if self.eval_prompts is None:
            raise ValueError("there are no held-out prompts: pass `eval_prompts`")
        accelerator = self.trainer.accelerator
        if len(self.eval_prompts) < accelerator.num_processes:
            raise ValueError(
                f"{accelerator.num_processes} processes share {len(self.eval_prompts)} held-out prompts: each needs "
                "one at least. Give more prompts, or evaluate on fewer processes."
            )
        rows = range(accelerator.process_index, len(self.eval_prompts), accelerator.num_processes)
        found = evaluate(
            self.collector, self.trainer.scorer, self.eval_prompts, self.rewards, judges=self.judges, rows=rows,
            seed=seed + 100003 * accelerator.process_index, whole_parameters=self.trainer.whole_parameters,
        )  # fmt: skip
        return found if accelerator.num_processes == 1 else _gathered(found, self.trainer)

    def _after_iteration(self, request: StopRequest, deadline: float | None) -> None:
        config, state = self.config, self.state
        due = state.iteration == config.iterations
        if config.eval_every and (due or state.iteration % config.eval_every == 0) and self.eval_prompts is not None:
            self._evaluate_and_keep_best()
        self._record()
        wishes = [bool(callback(self.trainer, state)) for callback in self.callbacks]
        kl = state.metrics["objective/kl"]
        reasons = {
            request.name or "signal": request.asked,
            "time limit": deadline is not None and time.monotonic() > deadline,
            "callback": any(wishes),
            f"KL budget: {kl:.1f} nats": config.max_kl is not None and kl > config.max_kl,
        }
        # A wish of one process is a wish of all: nobody may go on alone.
        asked = self.trainer.processes.reduce_sum(
            torch.tensor([float(wish) for wish in reasons.values()], device=self.trainer.current_device)
        )
        if float(asked.sum()) > 0:
            state.stopped = list(reasons)[int(asked.argmax())]
        if due or state.stopped is not None:
            self._write_traces()
        periodic = config.save_every and (due or state.iteration % config.save_every == 0)
        if self.folder is not None and (periodic or state.stopped is not None):
            save_checkpoint(self, self.folder.path)

    def _write_traces(self) -> None:
        """Some responses of the newest iteration, token by token."""
        trainer = self.trainer
        if self.folder is None or self.newest is None or trainer.newest is None:
            return
        if trainer.accelerator.is_main_process:
            collected, scores = self.newest
            kept = [row for row, skipped in enumerate(scores.skipped.tolist()) if not skipped]
            self.folder.append_tokens(
                token_traces(
                    *trainer.newest, trainer.tokenizer, iteration=self.state.iteration,
                    prompts=[collected.prompts[row] for row in kept], scores=scores.total[kept].tolist(),
                )
            )  # fmt: skip

    def _evaluate_and_keep_best(self) -> None:
        config, state = self.config, self.state
        state.evaluation = self.evaluate()
        summary = state.evaluation.summary()
        means = {f"eval/{name}": value["mean"] for name, value in summary.items()}
        state.metrics.update(means)
        if config.keep_best is None:
            return
        if config.keep_best not in summary:
            raise ValueError(f"keep_best names {config.keep_best!r}, the evaluation has {sorted(summary)}")
        within = config.max_kl is None or summary["kl"]["mean"] <= config.max_kl
        mean = summary[config.keep_best]["mean"]
        if within and (state.best is None or mean > state.best):
            state.best = mean
            if self.folder is not None:
                self.trainer.save_pretrained(self.folder.path / "best")


def _check_tokenizer(trainer: "rlhf_ppo.trainer.PPOTrainer") -> None:
    vocab_size = trainer.limits.vocab_size
    if vocab_size is not None and len(trainer.tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer's ids go up to {len(trainer.tokenizer) - 1}, but the model has {vocab_size} embeddings: "
            "they do not belong together. Load the model's own tokenizer, or resize the model's token embeddings."
        )


def _gathered(found: Evaluation, trainer: "rlhf_ppo.trainer.PPOTrainer") -> Evaluation:
    """The evaluations of all processes in the order of the prompts, which were dealt out one by one."""
    parts: list[Evaluation] = trainer.processes.gather_objects([found])

    def merged(columns: list[list[Any]]) -> list[Any]:
        rows = zip_longest(*columns, fillvalue=_NOTHING)
        return [item for row in rows for item in row if item is not _NOTHING]

    return Evaluation(
        prompts=merged([part.prompts for part in parts]),
        responses=merged([part.responses for part in parts]),
        measures={name: merged([part.measures[name] for part in parts]) for name in found.measures},
    )


_NOTHING = object()


def _postfix(metrics: dict[str, float]) -> dict[str, str]:
    shown = {"reward": "env/reward_mean", "kl": "objective/kl", "length": "tokens/responses_len_mean"}
    return {name: f"{metrics[key]:.3g}" for name, key in shown.items()}
