"""Diagnostics of a run: the doctor of the first batch, guards against reward hacking, dumps of failed updates."""
