"""The managed loop of `PPOTrainer.train`: prompts -> responses -> scores -> `learn`, evaluation, checkpoints, stop."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from rlhf_ppo.checkpoints.best import BestModels
from rlhf_ppo.checkpoints.random_streams import RandomStreams
from rlhf_ppo.checkpoints.resume import Stateful
from rlhf_ppo.diagnostics.doctor import diagnose_first_batch
from rlhf_ppo.diagnostics.guards import GuardMonitor, GuardVerdict
from rlhf_ppo.diagnostics.text_checks import DiagnosedBatch
from rlhf_ppo.environments import EnvironmentFactory
from rlhf_ppo.functional import total_scores
from rlhf_ppo.learner.finite_checks import check_learnable
from rlhf_ppo.learner.ppo_learner import PPOLearner
from rlhf_ppo.learner.statistics import scalar_statistics
from rlhf_ppo.loop.checks import LostRollouts, check_inputs
from rlhf_ppo.loop.config import Callback, TrainConfig, TrainState, check_settings
from rlhf_ppo.loop.curriculum import update_curriculum
from rlhf_ppo.loop.dynamic_sampling import roll_out
from rlhf_ppo.loop.evaluation import Evaluation, evaluate, judge_names, merge_evaluations
from rlhf_ppo.loop.rollout_metrics import progress_postfix, rollout_metrics
from rlhf_ppo.loop.run_keeper import RunKeeper, restorer
from rlhf_ppo.loop.sampling import make_collector, make_prompt_sampler, why_sampler_differs, with_model_stops
from rlhf_ppo.loop.signals import StopRequest, TimeLimit, stop_on_signals
from rlhf_ppo.loop.token_traces import token_traces
from rlhf_ppo.rewards.offload import offload_sources
from rlhf_ppo.rewards.sources import RewardScores, RewardSources, named_sources
from rlhf_ppo.rollout.collect import DecodedResponses
from rlhf_ppo.rollout.episodes import NumberedEpisodes
from rlhf_ppo.rollout.experience import Responses
from rlhf_ppo.rollout.prompts import PromptDataset
from rlhf_ppo.rollout.rebalance import rebalance_empty_ranks
from rlhf_ppo.samplers.base import Sampler
from rlhf_ppo.utils.progress import ProgressBar

__all__ = ["Callback", "TrainConfig", "TrainState", "TrainingLoop"]


@dataclass
class TrainingLoop:
    """The managed loop: one call of `PPOTrainer.train`.

    Args:
        learner: Its `learn` is the optimization step.
        rewards: Reward sources that score the responses; None: the environment's rewards alone.
        judges: Further reward sources, called in the held-out evaluation only.
        sampler: Samples the responses; None: `DecodeLoop`.
        environment: Makes the environment of an episode; None: responses of one turn.
    """

    learner: PPOLearner
    prompts: PromptDataset | NumberedEpisodes
    rewards: RewardSources | None
    config: TrainConfig
    eval_prompts: PromptDataset | NumberedEpisodes | None = None
    judges: RewardSources | None = None
    callbacks: Sequence[Callback] = ()
    sampler: Sampler | None = None
    environment: EnvironmentFactory | None = None

    def __post_init__(self) -> None:
        learner, self.config = self.learner, with_model_stops(self.config, self.learner)
        config = self.config
        check_settings(learner, config)
        check_inputs(
            learner, config, prompts=self.prompts, eval_prompts=self.eval_prompts, rewards=self.rewards,
            judges=self.judges, environment=self.environment,
        )  # fmt: skip
        self.generator, self._batch_size = learner.rollout_generator, learner.config.batch_size
        self.collector = make_collector(learner, config, self.sampler, self.environment)
        self.prompt_sampler = make_prompt_sampler(learner, config, self.prompts)
        self.keeper = RunKeeper(
            learner, config.output_dir, shared=self.shared_state, per_process=self.per_process_state,
            keep_last=config.keep_last,
        )  # fmt: skip
        folder = None if self.keeper.folder is None else self.keeper.folder.path
        self.best = BestModels(
            folder=folder, measure=config.keep_best or "score",
            frontier_size=config.keep_frontier, max_reference_kl=config.max_reference_kl, save=learner.save_pretrained,
            is_main_process=learner.accelerator.is_main_process,
        )  # fmt: skip
        self.guard_monitor = GuardMonitor(config.guards, config.max_reference_kl)
        self.lost_rollouts = LostRollouts(learner.processes, config.reward_failures)
        learner.dump_dir = learner.dump_dir or folder
        self.state = TrainState()
        self.last_responses: Responses | None = None
        self._stop_request = StopRequest()

    def run(self) -> TrainState:
        """Iterate until all iterations are done, or a callback, a guard, a signal or the time limit stops the loop.

        Raises:
            FolderInUseError: Another run uses the run folder.
        """
        offloads = self.config.offload_rewards and self.rewards is not None
        roles = [role for role in (self.learner.model, self.learner.ref_model) if role is not None]
        kept = [tensor for role in roles for tensor in (*role.parameters(), *role.buffers())]
        offloaded = offload_sources(self.rewards or (), excluded=kept) if offloads else nullcontext(nullcontext)
        with self.keeper.locked(), offloaded as sources_context:
            self.collector = replace(self.collector, sources_context=sources_context)
            self.learner.expect_sampler(why_sampler_differs(self.learner, self.collector.sampler))
            self.learner.sources_context = sources_context
            try:
                return self._run()
            finally:
                self.learner.sources_context = nullcontext

    def _run(self) -> TrainState:
        self.learner.prompt_sampler = self.prompt_sampler  # another call goes on from here
        self.best.recover()
        if self.config.resume:
            self.restore()
        else:
            self.keeper.start_anew()
        limit = TimeLimit(self.config.max_time)
        bar = ProgressBar(
            total=self.config.iterations, initial=self.state.iteration, desc="PPO", unit="it",
            disable=not (self.config.progress and self.learner.accelerator.is_main_process),
        )  # fmt: skip
        with bar, stop_on_signals() as self._stop_request:
            while self.state.iteration < self.config.iterations and self.state.stopped is None:
                undo = restorer({**self.per_process_state(), "prompts": self.prompt_sampler})
                with self.keeper.saved_before_error(self.state.iteration, undo):
                    rollout = self._roll_out()
                if rollout is None or self._is_stop_requested():
                    self._discard_and_stop(undo)
                    break
                with self.keeper.saved_before_error(self.state.iteration, undo, together=True):
                    if self.lost_rollouts.is_lost(len(self.collector.kept_rows(rollout[1]))):
                        continue
                self._learn(*rollout, undo=undo)
                bar.update()
                bar.set_postfix(progress_postfix(self.state.metrics))
                self._after_iteration(limit)
        return self.state

    def per_process_state(self) -> dict[str, Stateful]:
        """State of each process: random streams, and what the user passed that has a state."""
        sources = () if self.rewards is None else named_sources(self.rewards)
        candidates: dict[str, object] = {f"rewards/{item.name}": item.source for item in sources}
        candidates |= {f"callbacks/{index}": callback for index, callback in enumerate(self.callbacks)}
        candidates |= {"sampler": self.sampler, "environment": self.environment}
        states = {name: part for name, part in candidates.items() if isinstance(part, Stateful)}
        states = {name: part for name, part in states.items() if not isinstance(part, type)}  # a class has no state
        return {"random": RandomStreams(self.generator), **states}

    def shared_state(self) -> dict[str, Stateful]:
        """State that is the same on every process, besides the learner's."""
        return {
            "prompts": self.prompt_sampler, "best": self.best, "trackers": self.learner.trackers,
            "guards": self.guard_monitor, "lost": self.lost_rollouts,
        }  # fmt: skip

    def restore(self) -> None:
        """Restore the latest intact checkpoint in the run folder, if there is one."""
        restored = self.keeper.restore()
        if restored is not None:
            self.state.iteration, self.state.best = restored.iteration, self.best.best

    def _roll_out(self) -> tuple[DecodedResponses, RewardScores, dict[str, float]] | None:
        """Sample and score responses: (responses, scores, seconds). None after a stop between two rounds."""
        self._follow_settings()
        group_size = self.config.sampling.num_return_sequences
        return roll_out(
            lambda: self.collector.sample(self.prompts.batch(next(self.prompt_sampler)), self.generator),
            lambda collected: update_curriculum(
                self.prompt_sampler, self.collector.score(collected, self.rewards, self.config.missing_eos)
            ),
            self._is_stop_requested, dynamic=self.config.dynamic_sampling, group_size=group_size,
            groups=self.learner.config.batch_size // group_size, any_process=self.learner.processes.any_process,
            best_of=self.config.best_of if self.learner.algorithm.needs_groups else None,
        )  # fmt: skip

    def _follow_settings(self) -> None:
        """Sample from the learner's present model at its present temperature, which a callback may have changed."""
        learner, settings, sampling = self.learner, self.learner.config, self.config.sampling
        if settings.batch_size != self._batch_size:
            raise ValueError(
                f"expected PPOConfig.batch_size={self._batch_size} until train() returns, got {settings.batch_size}: "
                "the prompts of an epoch are divided into batches of the former size. Set it back, or set it between "
                "two calls of train()."
            )
        if settings.temperature != sampling.temperature or self.collector.model is not learner.model:
            self.config = replace(self.config, sampling=replace(sampling, temperature=settings.temperature))
            self.collector = make_collector(learner, self.config, self.sampler, self.environment)
            learner.expect_sampler(why_sampler_differs(learner, self.collector.sampler))

    def _is_stop_requested(self) -> bool:
        """Whether any process has received a signal."""
        return self.learner.processes.any_process(self._stop_request.is_set)

    def _discard_and_stop(self, undo: Callable[[], None]) -> None:
        """Restore the state before the rollout, save a checkpoint, and stop."""
        undo()
        self.state.stopped, self.state.interrupted = self._stop_request.signal_name or "signal", True
        self.keeper.save(self.state.iteration, required=True)

    def _learn(
        self, collected: DecodedResponses, scores: RewardScores, times: dict[str, float], *, undo: Callable[[], None]
    ) -> None:
        learner = self.learner
        start = time.perf_counter()
        if collected.prompts:
            batch = DiagnosedBatch.of_rollout(collected, scores, self.config.sampling, self.rewards, self.environment)
            diagnose_first_batch(learner, batch)
        local = self.collector.responses(collected, scores)
        process, device = learner.accelerator.process_index, learner.current_device
        with self.keeper.saved_before_error(self.state.iteration, undo, together=True):
            responses = rebalance_empty_ranks(local, learner.processes.gather_objects, process, device)
            check_learnable(responses, learner.processes, has_critic=learner.algorithm.has_critic)
        statistics = learner.learn(responses)
        self.last_responses = responses
        self.state.iteration += 1
        of_rollout, repeated = rollout_metrics(learner.processes, collected, scores)
        metrics = scalar_statistics(statistics) | learner.metrics | of_rollout | times
        metrics |= {
            "env/rollouts_lost": float(self.lost_rollouts.total),
            "time/iteration": sum(times.values()) + time.perf_counter() - start,
        }
        metrics |= self.guard_monitor.measure(repeated, metrics["tokens/actions_mean"])
        self.state.metrics = metrics
        self.state.history.append(metrics)
        del self.state.history[: -self.config.keep_history]

    def _record(self) -> None:
        learner, metrics = self.learner, self.state.metrics
        learner.current_step = self.state.iteration
        learner.trackers.log(metrics, max(self.state.iteration, learner.trackers.step + 1))  # goes on in later calls
        self.keeper.write(self.state.iteration, lambda folder: folder.append_metrics(self.state.iteration, metrics))

    def evaluate(self, *, seed: int = 0) -> Evaluation:
        """Evaluate the current policy on the held-out prompts, which are divided over processes."""
        if self.eval_prompts is None:
            raise ValueError("there are no held-out prompts: pass `eval_prompts`")
        accelerator = self.learner.accelerator
        rows = range(accelerator.process_index, len(self.eval_prompts), accelerator.num_processes)
        collector = self.collector.for_evaluation(seed)
        evaluation = evaluate(
            collector, self.learner.scorer, self.eval_prompts, self.rewards, judges=self.judges, rows=rows,
            seed=seed + 100003 * accelerator.process_index,
        )  # fmt: skip
        return merge_evaluations(self.learner.processes.gather_objects([evaluation]))

    def _after_iteration(self, limit: TimeLimit) -> None:
        config, state = self.config, self.state
        is_last = state.iteration == config.iterations
        summary = None
        if config.eval_every and (is_last or state.iteration % config.eval_every == 0):
            with self.keeper.saved_before_error(state.iteration, self._record):
                state.evaluation = self.evaluate()
            summary = state.evaluation.summary()
            state.metrics.update({f"eval/{name}": value["mean"] for name, value in summary.items()})
            state.metrics.update(self.guard_monitor.compare(state.evaluation.measures, judge_names(self.judges)))
        verdict = self.guard_monitor.verdict(state.metrics)
        state.metrics.update(verdict.metrics)
        if summary is not None and config.keep_best is not None:
            self.best.consider(state.iteration, summary, is_eligible=verdict.may_keep)
            state.best = self.best.best
        self._record()
        with self.keeper.saved_before_error(state.iteration):  # a callback may fail
            self._find_reason_to_stop(limit, verdict)
        if is_last or state.stopped is not None:
            self._write_traces()
        periodic = config.save_every and (is_last or state.iteration % config.save_every == 0)
        if periodic or self.keeper.checkpoint_is_overdue or state.stopped is not None:
            self.keeper.save(self.state.iteration, required=state.interrupted)

    def _find_reason_to_stop(self, limit: TimeLimit, verdict: GuardVerdict) -> None:
        """Set `state.stopped` on all processes to the reason that most of them have, the first one on a tie."""
        state = self.state
        callback_stops = [bool(callback(self.learner, state)) for callback in self.callbacks]
        is_near = limit.is_near()
        interruptions = {
            self._stop_request.signal_name or "signal": self._stop_request.is_set,
            "time limit": is_near and state.iteration < self.config.iterations,
        }
        reasons = interruptions | {
            "callback": any(callback_stops),
            verdict.stop or "guard": verdict.stop is not None,
        }
        # A reason on one process stops all: the loop is collective.
        counts = self.learner.processes.reduce_sum(
            torch.tensor([float(holds) for holds in reasons.values()], device=self.learner.current_device)
        )
        if float(counts.sum()) > 0:
            first = int(counts.argmax())
            state.stopped, state.interrupted = list(reasons)[first], first < len(interruptions)

    def _write_traces(self) -> None:
        learner = self.learner
        if self.last_responses is None or learner.last_batch is None:
            return
        scores = total_scores(self.last_responses.scores, self.last_responses.mask).tolist()
        traces = token_traces(*learner.last_batch, learner.tokenizer, iteration=self.state.iteration, scores=scores)
        self.keeper.write(self.state.iteration, lambda folder: folder.append_tokens(traces))
