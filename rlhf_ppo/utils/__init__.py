"""Small helpers that know nothing of PPO."""
