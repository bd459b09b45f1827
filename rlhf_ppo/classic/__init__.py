"""The API of TRL's classic trainer (0.11 and before): methods and helpers that its scripts call."""
