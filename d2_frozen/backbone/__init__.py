"""Backbones shared by all tasks. Importing registers ``build_timm_backbone``."""

from d2_frozen.backbone.frozen import (
    PRECISIONS,
    FrozenBackbone,
    PartlyFrozenBackbone,
    exclude_frozen_from_ddp,
    freeze_backbone,
    freeze_stages,
)
from d2_frozen.backbone.plain_vit import PLAIN_FEATURE, PlainViT
from d2_frozen.backbone.shared import PassMemory, frozen_parts, share_equal_backbones
from d2_frozen.backbone.timm_backbone import TimmBackbone, build_timm_backbone, create_timm_backbone
from d2_frozen.backbone.weight_files import WeightFiles
from d2_frozen.backbone.weights import load_weights, read_weights, save_weights

__all__ = [
    "PLAIN_FEATURE",
    "PRECISIONS",
    "FrozenBackbone",
    "PartlyFrozenBackbone",
    "PassMemory",
    "PlainViT",
    "TimmBackbone",
    "WeightFiles",
    "build_timm_backbone",
    "create_timm_backbone",
    "exclude_frozen_from_ddp",
    "freeze_backbone",
    "freeze_stages",
    "frozen_parts",
    "load_weights",
    "read_weights",
    "save_weights",
    "share_equal_backbones",
]
