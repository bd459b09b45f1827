"""RLHF fine-tuning of language models: token-level PPO with a value head, a frozen reference and a reward model."""

import rlhf_ppo.utils.openmp  # noqa: F401  # isort: skip  it must come before torch
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
from rlhf_ppo.utils.moved_names import forward_old_names
from rlhf_ppo.utils.seeding import set_seed

__version__ = "0.1.0"

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

forward_old_names(__name__)
