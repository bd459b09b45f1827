"""Plan a run before it starts: memory per device by role and phase, and time from measured FLOP rates."""

from rlhf_ppo.plan.config import PlanConfig, PlanError
from rlhf_ppo.plan.memory import Plan, make_plan
from rlhf_ppo.plan.traces import MemoryTraces, trace_memory

__all__ = ["MemoryTraces", "Plan", "PlanConfig", "PlanError", "make_plan", "trace_memory"]
