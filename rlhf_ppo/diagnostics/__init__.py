"""What watches a run: the doctor of the first batch, guards against reward hacking, numbers that are not finite."""
