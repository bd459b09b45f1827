"""Helpers without PPO: type checks of settings, redaction, seeds, timing."""
