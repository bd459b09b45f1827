"""Reward sources: calling them, checking their scores, retries, scoring on one process, CPU offload."""
