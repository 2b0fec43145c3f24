"""Necks: bottom-up maps in, pyramid out. Importing registers ``build_frozen_backbone`` and
``build_frozen_bottom_up``.
"""

from d2_frozen.neck.bifpn import BiFPN, BiFPNLayer, WeightedFusion
from d2_frozen.neck.build import (
    NECK_NAMES,
    NECK_REGISTRY,
    build_frozen_backbone,
    build_frozen_bottom_up,
    build_neck,
)
from d2_frozen.neck.residual_fpn import ResidualBlock, ResidualFPN
from d2_frozen.neck.simple_feature_pyramid import PlainPyramid, SimpleFeaturePyramid

__all__ = [
    "NECK_NAMES",
    "NECK_REGISTRY",
    "BiFPN",
    "BiFPNLayer",
    "PlainPyramid",
    "ResidualBlock",
    "ResidualFPN",
    "SimpleFeaturePyramid",
    "WeightedFusion",
    "build_frozen_backbone",
    "build_frozen_bottom_up",
    "build_neck",
]
