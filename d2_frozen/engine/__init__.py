"""Training, checkpoints and hooks that all tasks share."""

from d2_frozen.engine.checkpoint import (
    CheckpointMismatchError,
    FrozenCheckpointer,
    frozen_parts,
    has_backbone,
    last_checkpoint,
    look_into_checkpoint,
    read_checkpoint,
    saved_seed,
)
from d2_frozen.engine.optimizer import build_optimizer
from d2_frozen.engine.trainer import FrozenTrainer

__all__ = [
    "CheckpointMismatchError",
    "FrozenCheckpointer",
    "FrozenTrainer",
    "build_optimizer",
    "frozen_parts",
    "has_backbone",
    "last_checkpoint",
    "look_into_checkpoint",
    "read_checkpoint",
    "saved_seed",
]
