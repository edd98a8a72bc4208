"""Training: the run's settings, a thin Trainer over DeepSpeed, checkpoints, progress."""
