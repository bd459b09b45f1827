"""Games of the environment recipes."""
