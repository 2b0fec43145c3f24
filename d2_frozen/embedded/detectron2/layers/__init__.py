"""Building blocks below the models: convolutions, normalisations, NMS, ROIAlign, mask pasting, losses."""

from detectron2._outside import outside_subset
from detectron2.layers.aspp import ASPP
from detectron2.layers.batch_norm import CycleBatchNormList, FrozenBatchNorm2d, NaiveSyncBatchNorm, get_norm
from detectron2.layers.blocks import CNNBlockBase, DepthwiseSeparableConv2d
from detectron2.layers.deform_conv import DeformConv, ModulatedDeformConv
from detectron2.layers.losses import ciou_loss, diou_loss
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.layers.nms import batched_nms, nms
from detectron2.layers.roi_align import ROIAlign, roi_align
from detectron2.layers.shape_spec import ShapeSpec
from detectron2.layers.wrappers import (
    BatchNorm2d,
    Conv2d,
    ConvTranspose2d,
    Linear,
    cat,
    cross_entropy,
    empty_input_loss_func_wrapper,
    interpolate,
    move_device_like,
    nonzero_tuple,
    shapes_to_tensor,
)

__getattr__ = outside_subset(
    __name__, ("ROIAlignRotated", "roi_align_rotated", "nms_rotated", "batched_nms_rotated")
)

__all__ = [
    "ASPP",
    "BatchNorm2d",
    "CNNBlockBase",
    "Conv2d",
    "ConvTranspose2d",
    "CycleBatchNormList",
    "DeformConv",
    "DepthwiseSeparableConv2d",
    "FrozenBatchNorm2d",
    "Linear",
    "ModulatedDeformConv",
    "NaiveSyncBatchNorm",
    "ROIAlign",
    "ShapeSpec",
    "batched_nms",
    "cat",
    "ciou_loss",
    "cross_entropy",
    "diou_loss",
    "empty_input_loss_func_wrapper",
    "get_norm",
    "interpolate",
    "move_device_like",
    "nms",
    "nonzero_tuple",
    "paste_masks_in_image",
    "roi_align",
    "shapes_to_tensor",
]
