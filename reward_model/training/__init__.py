"""Training: settings, losses, the trainer, checkpoints, records."""
