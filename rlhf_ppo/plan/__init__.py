"""What a run will need before it is started: bytes on each device by role, and time from measured rates."""

from rlhf_ppo.plan.config import PlanConfig, PlanError
from rlhf_ppo.plan.memory import Plan, make_plan
from rlhf_ppo.plan.traces import Traces, trace

__all__ = ["Plan", "PlanConfig", "PlanError", "Traces", "make_plan", "trace"]
