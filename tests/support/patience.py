"""One time limit for everything that a test waits for."""

PATIENCE = 900.0
"""Seconds before a wait counts as a hang: more than anything takes on a machine 20 times slower."""
