"""Continuous and discrete control (Gymnasium) with the algorithms and updates of the language models."""

from importlib.util import find_spec

if find_spec("gymnasium") is None or find_spec("mujoco") is None:
    raise ModuleNotFoundError(
        "expected gymnasium and mujoco, but at least one is not installed: without them there are no "
        "environments. Install the extra: pip install 'rlhf_ppo[control]'."
    )

from rlhf_ppo.control.algorithms import AlgorithmName, control_algorithm
from rlhf_ppo.control.environments import EnvironmentConfig, Environments, make_environment
from rlhf_ppo.control.evaluation import EvaluationResult, evaluate, render_frames
from rlhf_ppo.control.normalization import Normalizer
from rlhf_ppo.control.policy import Categorical, ControlInputs, ControlPolicy, Gaussian
from rlhf_ppo.control.randomization import DomainRandomization, Randomization
from rlhf_ppo.control.trainer import ControlConfig, ControlTrainer
from rlhf_ppo.utils.moved_names import forward_old_names

__all__ = [
    "AlgorithmName", "Categorical", "ControlConfig", "ControlInputs", "ControlPolicy", "ControlTrainer",
    "DomainRandomization", "EnvironmentConfig", "Environments", "EvaluationResult", "Gaussian", "Normalizer",
    "Randomization", "control_algorithm", "evaluate", "make_environment", "render_frames",
]  # fmt: skip

forward_old_names(__name__)
