"""Segmentation models. Importing registers FrozenSegmentor and the heads in Detectron2's registries."""

from seg_app.models.config import add_mask_former_config
from seg_app.models.mask_former_head import Mask2FormerHead
from seg_app.models.pixel_heads import LinearSegHead, UPerNetHead
from seg_app.models.segmentor import FrozenSegmentor

__all__ = ["FrozenSegmentor", "LinearSegHead", "Mask2FormerHead", "UPerNetHead", "add_mask_former_config"]
