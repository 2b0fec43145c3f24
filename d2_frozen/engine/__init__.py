"""Training, checkpoints and hooks that all tasks share."""
