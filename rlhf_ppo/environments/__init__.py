"""Environments of several turns: they speak text, a wrapper owns the tokens."""

from rlhf_ppo.environments.base import Environment, EnvironmentFactory, Messages, Observation, Turn
from rlhf_ppo.environments.config import EpisodeConfig
from rlhf_ppo.environments.episode import Episode
from rlhf_ppo.environments.sampler import EnvironmentSampler, PlayedEpisodes

__all__ = [
    "Environment",
    "EnvironmentFactory",
    "EnvironmentSampler",
    "Episode",
    "EpisodeConfig",
    "Messages",
    "Observation",
    "PlayedEpisodes",
    "Turn",
]
