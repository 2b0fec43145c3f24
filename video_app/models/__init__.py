"""Video models. Importing registers FrozenVideoClassifier, FrozenVideoSweep and the heads."""

from video_app.models.classifier import FrozenVideoClassifier
from video_app.models.config import add_video_head_config
from video_app.models.heads import (
    VIDEO_HEADS_REGISTRY,
    AttentiveProbe,
    GlobalVideoHead,
    LinearVideoHead,
    SpatialTemporalVideoHead,
    TemporalVideoHead,
    build_video_head,
)
from video_app.models.sweep import FrozenVideoSweep

__all__ = [
    "VIDEO_HEADS_REGISTRY",
    "AttentiveProbe",
    "FrozenVideoClassifier",
    "FrozenVideoSweep",
    "GlobalVideoHead",
    "LinearVideoHead",
    "SpatialTemporalVideoHead",
    "TemporalVideoHead",
    "add_video_head_config",
    "build_video_head",
]
