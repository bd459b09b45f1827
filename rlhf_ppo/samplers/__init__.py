"""Samplers: prompts in, response tokens and their log-probabilities out."""
