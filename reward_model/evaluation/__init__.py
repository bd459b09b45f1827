"""How good a reward model is: scores, metrics, report card."""
