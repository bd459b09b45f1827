"""Texts and conversations: one reading for prompts, training, scoring and serving."""
