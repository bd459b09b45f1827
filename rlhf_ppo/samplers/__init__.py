"""Samplers: from prompts to response tokens and their log-probabilities."""
