"""The managed loop: prompts -> responses -> scores -> `learn`, with evaluation, checkpoints and early stop."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from rlhf_ppo.checkpoints.best import BestModels
from rlhf_ppo.checkpoints.random_streams import RandomStreams
from rlhf_ppo.checkpoints.resume import Stateful
from rlhf_ppo.diagnostics.doctor import diagnose_first_batch
from rlhf_ppo.diagnostics.guards import GuardMonitor, GuardVerdict, repetition, with_kl_budget
from rlhf_ppo.diagnostics.text_checks import DiagnosedBatch
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.learner.statistics import scalar_statistics
from rlhf_ppo.loop.checks import LostRollouts, check_inputs
from rlhf_ppo.loop.config import Callback, TrainConfig, TrainState, check_settings
from rlhf_ppo.loop.evaluation import Evaluation, evaluate, merge_evaluations
from rlhf_ppo.loop.run_keeper import RunKeeper
from rlhf_ppo.loop.sampling import make_collector
from rlhf_ppo.loop.signals import StopRequest, TimeLimit, stop_on_signals
from rlhf_ppo.loop.token_traces import token_traces
from rlhf_ppo.rewards.offload import offload_sources
from rlhf_ppo.rewards.sources import RewardScores, RewardSources, named_sources
from rlhf_ppo.rollout.collect import CollectedResponses
from rlhf_ppo.rollout.prompts import PromptDataset, PromptSampler
from rlhf_ppo.rollout.rebalance import rebalance_empty_ranks
from rlhf_ppo.samplers.base import Sampler
from rlhf_ppo.utils.progress import ProgressBar

__all__ = ["Callback", "TrainConfig", "TrainState", "TrainingLoop"]


@dataclass
class TrainingLoop:
    """One call of `PPOTrainer.train`: wiring in the order of the data.

    Args:
        learner: Whose `learn` is the optimization step.
        prompts: What is answered.
        rewards: Who scores the answers.
        config: How long, how often, where to.
        eval_prompts: Held-out prompts.
        judges: Further sources for the held-out evaluation, which the policy is not rewarded by.
        callbacks: Called after every iteration.
        sampler: Who draws responses; None: the own decode loop.
    """

    learner: PPOLearner
    prompts: PromptDataset
    rewards: RewardSources
    config: TrainConfig
    eval_prompts: PromptDataset | None = None
    judges: RewardSources | None = None
    callbacks: Sequence[Callback] = ()
    sampler: Sampler | None = None

    def __post_init__(self) -> None:
        learner, sampling, config = self.learner, self.config.sampling, self.config
        check_settings(learner, config)
        check_inputs(
            learner, config, prompts=self.prompts, eval_prompts=self.eval_prompts, rewards=self.rewards,
            judges=self.judges,
        )  # fmt: skip
        accelerator, seed = learner.accelerator, learner.config.seed
        self.collector = make_collector(learner, config, self.sampler)
        self.generator = torch.Generator(device="cpu").manual_seed(seed + 100003 * accelerator.process_index)
        self.order = PromptSampler(
            len(self.prompts), batch_size=learner.config.batch_size // sampling.num_return_sequences, seed=seed,
            rank=accelerator.process_index, world_size=accelerator.num_processes, lengths=self.prompts.lengths,
        )  # fmt: skip
        self.keeper = RunKeeper(
            learner, config.output_dir, shared=self.shared_parts, own=self.own_parts, keep_last=config.keep_last
        )
        folder = None if self.keeper.folder is None else self.keeper.folder.path
        self.best = BestModels(
            folder=folder, measure=config.keep_best or "score",
            most=config.keep_frontier, max_reference_kl=config.max_reference_kl, save=learner.save_pretrained,
            is_main_process=accelerator.is_main_process,
        )  # fmt: skip
        self.watch = GuardMonitor(with_kl_budget(config.guards, config.max_reference_kl))
        self.lost = LostRollouts(learner.processes, config.reward_failures)
        learner.dump_dir = learner.dump_dir or folder
        self.state = TrainState()
        self.newest: tuple[CollectedResponses, RewardScores] | None = None
        self._request = StopRequest()

    def run(self) -> TrainState:
        """Iterate until the budget, a callback, a guard or a signal says stop.

        Raises:
            FolderInUseError: Another run writes into the run folder.
        """
        waiting = offload_sources(self.rewards) if self.config.offload_rewards else nullcontext(nullcontext)
        with self.keeper.alone(), waiting as at_hand:
            self.collector = replace(self.collector, sources_context=at_hand)
            return self._run()

    def _run(self) -> TrainState:
        self.best.recover()
        if self.config.resume:
            self.restore()
        limit = TimeLimit(self.config.max_time)
        bar = ProgressBar(
            total=self.config.iterations, initial=self.state.iteration, desc="PPO", unit="it",
            disable=not (self.config.progress and self.learner.accelerator.is_main_process),
        )  # fmt: skip
        with bar, stop_on_signals() as self._request:
            while self.state.iteration < self.config.iterations and self.state.stopped is None:
                rollout = self._roll_out()
                if rollout is None:
                    break
                if self.lost.is_lost(len(self.collector.kept_rows(rollout[1]))):
                    continue
                self._learn(*rollout)
                bar.update()
                bar.set_postfix(_postfix(self.state.metrics))
                self._after_iteration(limit)
        return self.state

    def own_parts(self) -> dict[str, Stateful]:
        """What each process has for itself: random streams, and whatever of the user's has a state."""
        users: dict[str, object] = {f"rewards/{item.name}": item.source for item in named_sources(self.rewards)}
        users |= {f"callbacks/{index}": callback for index, callback in enumerate(self.callbacks)}
        users["sampler"] = self.sampler
        return {
            "random": RandomStreams(self.generator),
            **{name: part for name, part in users.items() if isinstance(part, Stateful)},
        }

    def shared_parts(self) -> dict[str, Stateful]:
        """What is the same on every process, beside the trainer's own."""
        return {
            "prompts": self.order, "best": self.best, "trackers": self.learner.trackers, "guards": self.watch,
            "lost": self.lost,
        }  # fmt: skip

    def restore(self) -> None:
        """Go on from the newest whole checkpoint in the run folder, if there is one."""
        found = self.keeper.restore()
        if found is not None:
            self.state.iteration, self.state.best = found.iteration, self.best.best

    def _roll_out(self) -> tuple[CollectedResponses, RewardScores, dict[str, float]] | None:
        """Responses and scores. None after a stop: they are dropped, and drawn again when the run is resumed."""
        parts: dict[str, Stateful] = {**self.own_parts(), "prompts": self.order}
        before = {name: part.state_dict() for name, part in parts.items()}
        start = time.perf_counter()
        try:
            collected = self.collector.sample(self.prompts.batch(next(self.order)), self.generator)
            generated = time.perf_counter()
            if self._asked_to_stop():
                self._drop(parts, before)
                return None
            scores = self.collector.score(collected, self.rewards, self.config.missing_eos)
        except Exception:
            self._rescue(parts, before)
            raise
        times = {"time/generate": generated - start, "time/reward": time.perf_counter() - generated}
        if self._asked_to_stop():
            self._drop(parts, before)
            return None
        return collected, scores, times

    def _asked_to_stop(self) -> bool:
        """Whether any process was sent a signal."""
        asked = torch.tensor(float(self._request.asked), device=self.learner.current_device)
        return float(self.learner.processes.reduce_sum(asked)) > 0

    def _drop(self, parts: Mapping[str, Stateful], before: Mapping[str, object]) -> None:
        """Forget a rollout as if it had never begun, and stop."""
        for name, part in parts.items():
            part.load_state_dict(before[name])
        self.state.stopped, self.state.interrupted = self._request.name or "signal", True
        self.keeper.save(self.state.iteration, must=True)

    def _rescue(self, parts: Mapping[str, Stateful], before: Mapping[str, object]) -> None:
        """Before an error in a rollout ends the run: save what was finished. Several processes cannot agree here."""
        if self.learner.accelerator.num_processes == 1:
            for name, part in parts.items():
                part.load_state_dict(before[name])
            self.keeper.save(self.state.iteration, must=False)

    def _learn(self, collected: CollectedResponses, scores: RewardScores, times: dict[str, float]) -> None:
        learner = self.learner
        start = time.perf_counter()
        diagnose_first_batch(learner, DiagnosedBatch.of_rollout(collected, scores, self.config.sampling, self.rewards))
        own = self.collector.responses(collected.samples, scores)
        process, device = learner.accelerator.process_index, learner.current_device
        responses = rebalance_empty_ranks(own, learner.processes.gather_objects, process, device)
        statistics = learner.learn(responses)
        self.newest = (collected, scores) if responses is own else None  # else: others' rows, without their texts
        self.state.iteration += 1
        first, *others = learner.processes.gather_objects([scores])
        all_scores: RewardScores = first.joined(others)
        finished = learner.processes.gather_objects(collected.samples.finished)
        repeated = learner.processes.gather_objects([repetition(row.tolist()) for row in collected.samples.responses])
        metrics = scalar_statistics(statistics) | learner.metrics | all_scores.metrics() | times
        metrics |= {
            "env/reward_mean": float(all_scores.total[~all_scores.skipped].mean()),
            "env/rollouts_lost": float(self.lost.total),
            "tokens/finished_share": sum(finished) / len(finished),
            "time/iteration": sum(times.values()) + time.perf_counter() - start,
        }
        metrics |= self.watch.measure(sum(repeated) / len(repeated), metrics["tokens/responses_len_mean"])
        self.state.metrics = metrics
        self.state.history.append(metrics)
        del self.state.history[: -self.config.keep_history]

    def _record(self) -> None:
        learner, metrics = self.learner, self.state.metrics
        learner.current_step = self.state.iteration
        learner.trackers.log(metrics, self.state.iteration)
        self.keeper.write(self.state.iteration, lambda folder: folder.append_metrics(self.state.iteration, metrics))

    def evaluate(self, *, seed: int = 0) -> Evaluation:
        """Answer the held-out prompts with the policy as it is; every process takes its share."""
        if self.eval_prompts is None:
            raise ValueError("there are no held-out prompts: pass `eval_prompts`")
        accelerator = self.learner.accelerator
        if len(self.eval_prompts) < accelerator.num_processes:
            raise ValueError(
                f"{accelerator.num_processes} processes share {len(self.eval_prompts)} held-out prompts: each needs "
                "one at least. Give more prompts, or evaluate on fewer processes."
            )
        rows = range(accelerator.process_index, len(self.eval_prompts), accelerator.num_processes)
        found = evaluate(
            self.collector, self.learner.scorer, self.eval_prompts, self.rewards, judges=self.judges, rows=rows,
            seed=seed + 100003 * accelerator.process_index,
        )  # fmt: skip
        return merge_evaluations(self.learner.processes.gather_objects([found]))

    def _after_iteration(self, limit: TimeLimit) -> None:
        config, state = self.config, self.state
        due = state.iteration == config.iterations
        summary = None
        if config.eval_every and (due or state.iteration % config.eval_every == 0):
            state.evaluation = self.evaluate()
            summary = state.evaluation.summary()
            state.metrics.update({f"eval/{name}": value["mean"] for name, value in summary.items()})
            state.metrics.update(self.watch.compare(state.evaluation.measures))
        verdict = self.watch.verdict(state.metrics)
        state.metrics.update(verdict.metrics)
        if summary is not None and config.keep_best is not None:
            self.best.take(state.iteration, summary, is_eligible=verdict.may_keep)
            state.best = self.best.best
        self._record()
        self._find_reason_to_stop(limit, verdict)
        if due or state.stopped is not None:
            self._write_traces()
        periodic = config.save_every and (due or state.iteration % config.save_every == 0)
        if periodic or self.keeper.checkpoint_is_overdue or state.stopped is not None:
            self.keeper.save(self.state.iteration, must=state.interrupted)

    def _find_reason_to_stop(self, limit: TimeLimit, verdict: GuardVerdict) -> None:
        state = self.state
        wishes = [bool(callback(self.learner, state)) for callback in self.callbacks]
        is_near = limit.is_near()
        interruptions = {
            self._request.name or "signal": self._request.asked,
            "time limit": is_near and state.iteration < self.config.iterations,
        }
        reasons = interruptions | {
            "callback": any(wishes),
            verdict.stop or "guard": verdict.stop is not None,
        }
        # A wish of one process is a wish of all: nobody may go on alone.
        asked = self.learner.processes.reduce_sum(
            torch.tensor([float(wish) for wish in reasons.values()], device=self.learner.current_device)
        )
        if float(asked.sum()) > 0:
            first = int(asked.argmax())
            state.stopped, state.interrupted = list(reasons)[first], first < len(interruptions)

    def _write_traces(self) -> None:
        """Some responses of the newest iteration, token by token."""
        learner = self.learner
        if self.newest is None or learner.newest is None:
            return
        collected, scores = self.newest
        kept = self.collector.kept_rows(scores)
        traces = token_traces(
            *learner.newest, learner.tokenizer, iteration=self.state.iteration,
            prompts=[collected.prompts[row] for row in kept], scores=scores.total[kept].tolist(),
        )  # fmt: skip
        self.keeper.write(self.state.iteration, lambda folder: folder.append_tokens(traces))


def _postfix(metrics: dict[str, float]) -> dict[str, str]:
    shown = {"reward": "env/reward_mean", "kl": "objective/kl", "length": "tokens/responses_len_mean"}
    return {name: f"{metrics[key]:.3g}" for name, key in shown.items()}
