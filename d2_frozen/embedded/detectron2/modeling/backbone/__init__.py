"""Networks that turn images into feature maps: ResNet, FPN, and the registry for more."""

from detectron2._outside import outside_subset

from .backbone import Backbone
from .build import BACKBONE_REGISTRY, build_backbone
from .fpn import FPN
from .resnet import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeformBottleneckBlock,
    ResNet,
    ResNetBlockBase,
    build_resnet_backbone,
    make_stage,
)

__all__ = [
    "BACKBONE_REGISTRY",
    "Backbone",
    "BasicBlock",
    "BasicStem",
    "BottleneckBlock",
    "DeformBottleneckBlock",
    "FPN",
    "ResNet",
    "ResNetBlockBase",
    "build_backbone",
    "build_resnet_backbone",
    "make_stage",
]

__getattr__ = outside_subset(
    __name__,
    (
        "MViT",
        "RegNet",
        "SimpleFeaturePyramid",
        "SwinTransformer",
        "ViT",
        "build_mobilenetv2_backbone",
        "get_vit_lr_decay_rate",
    ),
)
