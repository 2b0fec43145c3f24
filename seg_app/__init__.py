"""Semantic segmentation on the frozen backbone. It may import d2_frozen and detectron2, never video_app."""

import d2_frozen  # noqa: F401  (makes detectron2 importable)
