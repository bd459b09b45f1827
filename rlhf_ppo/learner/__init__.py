"""The learner: one iteration of the algorithm, from checked responses to updated parameters, and its configuration."""
