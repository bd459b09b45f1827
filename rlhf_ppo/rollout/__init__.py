"""Rollouts: prompts, sampled and scored responses, KL-shaped rewards."""
