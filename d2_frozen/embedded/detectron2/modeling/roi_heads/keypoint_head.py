"""Which keypoint head does a config name? Heads of projects only: the engine itself brings none.

The registry is here because projects register their heads while they are imported, also for runs without
keypoints.
"""

from __future__ import annotations

from torch import nn

from detectron2._outside import outside_subset
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

from .._lookup import registered

__all__ = ["ROI_KEYPOINT_HEAD_REGISTRY", "build_keypoint_head"]

ROI_KEYPOINT_HEAD_REGISTRY = Registry("ROI_KEYPOINT_HEAD")
ROI_KEYPOINT_HEAD_REGISTRY.__doc__ = """
Callables ``(cfg, input_shape: ShapeSpec) -> nn.Module`` by the name in ``MODEL.ROI_KEYPOINT_HEAD.NAME``.
"""


def build_keypoint_head(cfg, input_shape: ShapeSpec) -> nn.Module:
    """Build ``MODEL.ROI_KEYPOINT_HEAD.NAME``, which a project has registered."""
    name = cfg.MODEL.ROI_KEYPOINT_HEAD.NAME
    outside = ("KRCNNConvDeconvUpsampleHead",)
    return registered(ROI_KEYPOINT_HEAD_REGISTRY, name, "MODEL.ROI_KEYPOINT_HEAD.NAME", outside)(
        cfg, input_shape
    )


__getattr__ = outside_subset(
    __name__,
    (
        "BaseKeypointRCNNHead",
        "KRCNNConvDeconvUpsampleHead",
        "keypoint_rcnn_inference",
        "keypoint_rcnn_loss",
    ),
)
