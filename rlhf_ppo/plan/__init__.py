"""Plan a run before it starts: memory per device by role and phase, and time from measured FLOP rates."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlhf_ppo.plan.config import PlanConfig, PlanError

if TYPE_CHECKING:
    from rlhf_ppo.plan.memory import Plan, make_plan
    from rlhf_ppo.plan.traces import MemoryTraces, trace_memory

__all__ = ["MemoryTraces", "Plan", "PlanConfig", "PlanError", "make_plan", "trace_memory"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: the help of the command does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "memory" if name in ("Plan", "make_plan") else "traces"
    return getattr(import_module(f"rlhf_ppo.plan.{module}"), name)
