"""A config of a detector that is built in a moment, and an image for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import d2_frozen
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import BitMasks, Boxes, Instances


@pytest.fixture
def small_config() -> Callable[..., CfgNode]:
    """``small_config("KEY", value, ...)``."""
    return _small_config


@pytest.fixture
def labelled_image() -> Callable[[], dict]:
    """``labelled_image()``."""
    return _labelled_image


def _small_config(*options: object) -> CfgNode:
    cfg = d2_frozen.add_frozen_config(get_cfg())
    cfg.merge_from_list(
        [
            *("MODEL.META_ARCHITECTURE", "FrozenRCNN", "MODEL.DEVICE", "cpu", "MODEL.MASK_ON", True),
            *("MODEL.BACKBONE.NAME", "build_frozen_backbone", "MODEL.TIMM.NAME", "resnet18"),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.FPN.OUT_CHANNELS", 16),
            *("MODEL.BIFPN.NUM_LAYERS", 1, "MODEL.RESIDUAL_FPN.NUM_BLOCKS", 1),
            *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"], "MODEL.RPN.POST_NMS_TOPK_TRAIN", 20),
            *("MODEL.RPN.POST_NMS_TOPK_TEST", 10, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]),
            *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"], "MODEL.ROI_HEADS.NUM_CLASSES", 3),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
            *("MODEL.ROI_BOX_HEAD.NUM_FC", 1, "MODEL.ROI_BOX_HEAD.FC_DIM", 16),
            *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 4, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 4),
            *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
            *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "INPUT.MASK_FORMAT", "bitmask"),
            *options,
        ]
    )
    return cfg


def _labelled_image() -> dict:
    """One 64 x 96 image with one box that its mask fills."""
    mask = torch.zeros(1, 64, 96, dtype=torch.bool)
    mask[0, 16:48, 20:60] = True
    truth = Instances((64, 96))
    truth.gt_boxes = Boxes(torch.tensor([[20.0, 16.0, 60.0, 48.0]]))
    truth.gt_classes = torch.tensor([1])
    truth.gt_masks = BitMasks(mask)
    image = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(1)).float()
    return {"image": image, "instances": truth, "height": 64, "width": 96}
