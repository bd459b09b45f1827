"""Where the data of an iteration comes from: prompts, samplers, reward sources."""
