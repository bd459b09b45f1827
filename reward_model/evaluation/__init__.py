"""Measure reward models: scores of comparisons, metrics, and the report card."""
