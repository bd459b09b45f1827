"""Reward sources: who scores responses, and what happens when a source fails."""
