"""Train reward models: settings, losses, the trainer, checkpoints, and records."""
