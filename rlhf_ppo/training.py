"""The managed loop: prompts -> responses -> scores -> `learn`, with evaluation, checkpoints and early stop."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from tqdm.auto import tqdm

from rlhf_ppo.batch import TokenInputs, pad_rows
from rlhf_ppo.evaluation import Evaluation, reference_measures
from rlhf_ppo.functional import missing_eos_penalty
from rlhf_ppo.metrics import scalars
from rlhf_ppo.report.run_folder import RunFolder
from rlhf_ppo.resume import restore_checkpoint, save_checkpoint
from rlhf_ppo.rollout.decoding import DecodeLoop
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.rollout.prompts import PromptBatch, PromptDataset, PromptSampler
from rlhf_ppo.rollout.reward_sources import RewardRequest, Scores, Sources, score_batch
from rlhf_ppo.rollout.sampling import Sampler, Samples, SamplingConfig
from rlhf_ppo.signals import StopRequest, stop_on_signals

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
    missing_eos_penalty: float | None = None
    """What a response costs that ran to `max_new_tokens` without a stop token; None: nothing."""
    missing_eos_mode: Literal["replace", "subtract"] = "replace"
    """Whether the penalty replaces the score by its negative or is subtracted from it."""
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
        self.sampler = self.sampler or DecodeLoop(trainer.tokenizer)
        self.generator = torch.Generator(device="cpu").manual_seed(seed + 100003 * accelerator.process_index)
        self.order = PromptSampler(
            len(self.prompts), batch_size=trainer.config.batch_size // sampling.num_return_sequences, seed=seed,
            rank=accelerator.process_index, world_size=accelerator.num_processes,
        )  # fmt: skip
        self.folder = None if self.config.output_dir is None else RunFolder.create(self.config.output_dir)
        self.state = TrainState()

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
        batch = self.prompts.batch(next(self.order))
        samples = self.sample(batch, self.generator)
        generated = time.perf_counter()
        scores = self.score(batch, samples)
        scored = time.perf_counter()
        statistics = trainer.learn(self._responses(samples, scores))
        self.state.iteration += 1
        metrics = scalars(statistics) | trainer.metrics | scores.metrics()
        metrics |= {
            "env/reward_mean": float(scores.total[~scores.skipped].mean()),
            "tokens/finished_share": sum(samples.finished) / len(samples.finished),
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

    def sample(self, batch: PromptBatch, generator: torch.Generator) -> Samples:
        """Responses of the policy to a batch of prompts, on the trainer's device."""
        assert self.sampler is not None
        prompts = [prompt.to(self.trainer.current_device) for prompt in batch.input_ids]
        return self.sampler(self.trainer.model, prompts, self.config.sampling, generator=generator)

    def score(self, batch: PromptBatch, samples: Samples, sources: Sources | None = None) -> Scores:
        """Ask the sources about the decoded responses; the tokens themselves are never made again from text."""
        repeat = self.config.sampling.num_return_sequences
        request = RewardRequest(
            prompts=[text for text in batch.texts for _ in range(repeat)],
            responses=self.trainer.tokenizer.batch_decode(samples.responses, skip_special_tokens=True),
            columns={name: [item for item in column for _ in range(repeat)] for name, column in batch.columns.items()},
            response_lengths=[len(response) for response in samples.responses],
        )
        scores = score_batch(self.rewards if sources is None else sources, request)
        if self.config.missing_eos_penalty is None or sources is not None or scores.per_token is not None:
            return scores
        total = missing_eos_penalty(
            scores.total, torch.tensor(samples.finished),
            penalty=self.config.missing_eos_penalty, mode=self.config.missing_eos_mode,
        )  # fmt: skip
        return replace(scores, total=total)

    def evaluate(self, *, seed: int = 0) -> Evaluation:
        """Answer the held-out prompts with the policy as it is; the same seed draws the same numbers."""
        if self.eval_prompts is None:
            raise ValueError("there are no held-out prompts: pass `eval_prompts` to train()")
        one_each = replace(self.config, sampling=replace(self.config.sampling, num_return_sequences=1))
        loop = replace(self, config=replace(one_each, output_dir=None))
        accelerator = self.trainer.accelerator
        mine = list(range(len(self.eval_prompts)))[accelerator.process_index :: accelerator.num_processes]
        generator = torch.Generator(device="cpu").manual_seed(seed + 100003 * accelerator.process_index)
        batch = self.eval_prompts.batch(mine)
        samples = loop.sample(batch, generator)
        scores = loop.score(batch, samples, self.rewards)
        measures: dict[str, list[float]] = {"score": scores.total.tolist()}
        if self.judges is not None:
            for name, values in loop.score(batch, samples, self.judges).per_source.items():
                measures[name] = values.tolist()
        measures |= reference_measures(self.trainer.scorer, samples.prompts, samples.responses)
        texts = self.trainer.tokenizer.batch_decode(samples.responses, skip_special_tokens=True)
        found = Evaluation(prompts=batch.texts, responses=texts, measures=measures)
        return found if accelerator.num_processes == 1 else _gathered(found, self.trainer)

    def _responses(self, samples: Samples, scores: Scores) -> Responses:
        """The samples that were not skipped, as `learn` takes them."""
        kept = [row for row, skipped in enumerate(scores.skipped.tolist()) if not skipped]
        if not kept:
            raise ValueError("every sample of the batch was skipped by a reward source: there is nothing to learn from")
        device = self.trainer.current_device
        responses = [samples.responses[row].to(device) for row in kept]
        mask = pad_rows([torch.ones(len(response)) for response in responses]).bool()
        return Responses(
            inputs=TokenInputs(prompts=[samples.prompts[row].to(device) for row in kept], responses=responses),
            mask=mask.to(device),
            scores=scores.scores[kept].to(device),
            group_size=self.config.sampling.num_return_sequences,
        )

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
        asked = self.trainer._reduce_sum(
            torch.tensor([float(wish) for wish in reasons.values()], device=self.trainer.current_device)
        )
        if float(asked.sum()) > 0:
            state.stopped = list(reasons)[int(asked.argmax())]
        periodic = config.save_every and state.iteration % config.save_every == 0
        if self.folder is not None and (periodic or state.stopped is not None):
            save_checkpoint(self, self.folder.path)

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
    parts: list[Any] = trainer._gather_objects([found])
    measures = {name: [value for part in parts for value in part.measures[name]] for name in found.measures}
    return Evaluation(
        prompts=[text for part in parts for text in part.prompts],
        responses=[text for part in parts for text in part.responses],
        measures=measures,
    )


def _postfix(metrics: dict[str, float]) -> dict[str, str]:
    shown = {"reward": "env/reward_mean", "kl": "objective/kl", "length": "tokens/responses_len_mean"}
    return {name: f"{metrics[key]:.3g}" for name, key in shown.items()}
