"""The names of the package; `rlhf_ppo/__init__.py` imports this module when one of them is first asked for."""

from rlhf_ppo.algorithms import (
    CISPO,
    GAE,
    GRPO,
    GSPO,
    RLOO,
    TRPO,
    AdaptiveEntropy,
    AlgorithmConfig,
    BatchMean,
    ClipCovariance,
    Critic,
    DivergenceMask,
    LearnedValue,
    MovingMean,
    PositiveNLL,
    PPOClip,
    PPOPenalty,
    Reinforce,
    ReinforcePlusPlus,
    TopEntropyTokens,
)
from rlhf_ppo.classic.best_of_n import BestOfNSampler
from rlhf_ppo.classic.helpers import LengthSampler, respond_to_batch
from rlhf_ppo.functional import compute_ppo_total_loss
from rlhf_ppo.learner.config import PPOConfig
from rlhf_ppo.learner.kl_controllers import AdaptiveKLController, FixedKLController
from rlhf_ppo.loop.curriculum import Curriculum
from rlhf_ppo.loop.dynamic_sampling import DynamicSampling
from rlhf_ppo.loop.training import TrainConfig, TrainState
from rlhf_ppo.models import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PreTrainedModelWrapper,
    SeparateCritic,
    attach_critic,
    create_reference_model,
)
from rlhf_ppo.rollout.collect import SoftOverlong
from rlhf_ppo.trainer import PPOTrainer
from rlhf_ppo.updates.pretraining import PretrainingMix
from rlhf_ppo.utils.seeding import set_seed

__all__ = [
    "AdaptiveEntropy",
    "AdaptiveKLController",
    "AlgorithmConfig",
    "AutoModelForCausalLMWithValueHead",
    "AutoModelForSeq2SeqLMWithValueHead",
    "BatchMean",
    "BestOfNSampler",
    "CISPO",
    "ClipCovariance",
    "Critic",
    "Curriculum",
    "DivergenceMask",
    "DynamicSampling",
    "FixedKLController",
    "GAE",
    "GRPO",
    "GSPO",
    "LearnedValue",
    "LengthSampler",
    "MovingMean",
    "PPOClip",
    "PPOConfig",
    "PPOPenalty",
    "PPOTrainer",
    "PositiveNLL",
    "PreTrainedModelWrapper",
    "PretrainingMix",
    "RLOO",
    "Reinforce",
    "ReinforcePlusPlus",
    "SeparateCritic",
    "SoftOverlong",
    "TRPO",
    "TopEntropyTokens",
    "TrainConfig",
    "TrainState",
    "attach_critic",
    "compute_ppo_total_loss",
    "create_reference_model",
    "respond_to_batch",
    "set_seed",
]
