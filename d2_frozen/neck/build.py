"""Which backbone does a config ask for? Bottom-up network, frozen as the config says, with a neck on top."""

from __future__ import annotations

import logging

from d2_frozen.backbone import PLAIN_FEATURE, freeze_backbone
from d2_frozen.neck.bifpn import BiFPN, input_strides
from d2_frozen.neck.padding import PadsForBottomUp
from d2_frozen.neck.residual_fpn import ResidualFPN
from d2_frozen.neck.simple_feature_pyramid import STRIDE_OF, PlainPyramid, SimpleFeaturePyramid
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.utils.registry import Registry

NECK_NAMES = ("FPN", "ResidualFPN", "BiFPN", "SimpleFeaturePyramid", "none")
NECK_REGISTRY = Registry("NECK")
NECK_REGISTRY.__doc__ = """
Necks of others by MODEL.NECK.NAME, under names of their own. Called with ``(cfg, bottom_up)``, they give a Detectron2
Backbone that trains, with ``bottom_up`` as its attribute of that name. Detectron2 has no registry for them.
"""

# Sections of MODEL with IN_FEATURES that a model does not read, by MODEL.META_ARCHITECTURE: necks', and other tasks'.
_NO_BOXES = ("FPN", "RETINANET", "RPN", "ROI_HEADS")
_UNREAD = {
    "FrozenRCNN": ("FPN", "RETINANET", "SEM_SEG_HEAD"),
    "GeneralizedRCNN": ("FPN", "RETINANET", "SEM_SEG_HEAD"),
    "ProposalNetwork": ("FPN", "RETINANET", "SEM_SEG_HEAD", "ROI_HEADS"),
    "FrozenSegmentor": _NO_BOXES,
    "SemanticSegmentor": _NO_BOXES,
    "MaskFormer": _NO_BOXES,
}


@BACKBONE_REGISTRY.register()
def build_frozen_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """MODEL.FROZEN.BOTTOM_UP, frozen by MODEL.BACKBONE.FREEZE, under the neck MODEL.NECK.NAME, which trains.

    Raises:
        ValueError: a neck, freeze or precision value that does not exist, or input features that do not.
        KeyError: no backbone is registered under MODEL.FROZEN.BOTTOM_UP.
    """
    return build_neck(cfg, build_frozen_bottom_up(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_frozen_bottom_up(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """MODEL.FROZEN.BOTTOM_UP, frozen by MODEL.BACKBONE.FREEZE: the network's own maps, nothing added.

    Raises:
        As :func:`build_frozen_backbone`.
    """
    bottom_up = BACKBONE_REGISTRY.get(cfg.MODEL.FROZEN.BOTTOM_UP)(_unfrozen_by_builder(cfg), input_shape)
    if cfg.MODEL.BACKBONE.FREEZE == "all" and cfg.MODEL.TIMM.DROP_PATH_RATE:
        logging.getLogger(__name__).warning(
            "MODEL.TIMM.DROP_PATH_RATE is %s, but MODEL.BACKBONE.FREEZE: all leaves nothing for it to act on.",
            cfg.MODEL.TIMM.DROP_PATH_RATE,
        )
    frozen = cfg.MODEL.FROZEN
    return freeze_backbone(bottom_up, cfg.MODEL.BACKBONE.FREEZE, frozen.PRECISION, frozen.COMPILE)


def build_neck(cfg: CfgNode, bottom_up: Backbone) -> Backbone:
    """The neck MODEL.NECK.NAME on ``bottom_up``, with levels P2..P6 for inputs of strides 4..32.

    A plain ViT has one map: SimpleFeaturePyramid is a whole neck for it; the other necks get their inputs from the
    trained branches of the same pyramid (:class:`PlainPyramid`). "none" leaves res2..res5 as they are, for heads that
    have a neck of their own; of a plain ViT it makes those of them that the heads read.

    Raises:
        ValueError: no such neck, here or in NECK_REGISTRY, OUT_CHANNELS that its norm cannot divide, or IN_FEATURES
            that ``bottom_up`` lacks.
    """
    name, fpn = cfg.MODEL.NECK.NAME, cfg.MODEL.FPN
    if name not in NECK_NAMES and name in NECK_REGISTRY:
        return NECK_REGISTRY.get(name)(cfg, bottom_up)
    if name != "none" and fpn.NORM == "GN" and fpn.OUT_CHANNELS % 32:
        raise ValueError(
            f"MODEL.FPN.OUT_CHANNELS is {fpn.OUT_CHANNELS}, but MODEL.FPN.NORM GN has 32 groups of equal size: take a "
            "multiple of 32, or another norm."
        )
    plain = list(bottom_up.output_shape()) == [PLAIN_FEATURE]
    if name == "none":
        return PlainPyramid(bottom_up, _levels_of_heads(cfg)) if plain else bottom_up
    if name == "SimpleFeaturePyramid":
        if not plain:
            raise ValueError(
                "MODEL.NECK.NAME: SimpleFeaturePyramid is for plain ViTs, but the bottom-up network gives "
                f"{', '.join(bottom_up.output_shape())}. Use FPN, ResidualFPN or BiFPN."
            )
        return SimpleFeaturePyramid(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, norm=fpn.NORM)
    if plain:
        bottom_up = PlainPyramid(bottom_up, fpn.IN_FEATURES)
    input_strides(bottom_up, fpn.IN_FEATURES)
    if name == "FPN":
        return PlainFPN(
            bottom_up,
            fpn.IN_FEATURES,
            fpn.OUT_CHANNELS,
            fpn.NORM,
            top_block=LastLevelMaxPool(),
            fuse_type=fpn.FUSE_TYPE,
        )
    if name == "ResidualFPN":
        return ResidualFPN(
            bottom_up,
            fpn.IN_FEATURES,
            fpn.OUT_CHANNELS,
            num_blocks=cfg.MODEL.RESIDUAL_FPN.NUM_BLOCKS,
            norm=fpn.NORM,
            fuse_type=fpn.FUSE_TYPE,
        )
    if name == "BiFPN":
        return BiFPN(
            bottom_up,
            fpn.IN_FEATURES,
            fpn.OUT_CHANNELS,
            num_layers=cfg.MODEL.BIFPN.NUM_LAYERS,
            norm=fpn.NORM,
            separable=cfg.MODEL.BIFPN.SEPARABLE_CONV,
            fuse_type=cfg.MODEL.BIFPN.FUSE_TYPE,
        )
    known = ", ".join([*NECK_NAMES, *(other for other, _ in NECK_REGISTRY)])
    raise ValueError(
        f"MODEL.NECK.NAME is {name!r}; choose one of {known}. One of your own registers itself in "
        "d2_frozen.neck.NECK_REGISTRY when its module is imported."
    )


class PlainFPN(PadsForBottomUp, FPN):
    """Detectron2's FPN; only its padding rules also respect the bottom-up network's."""


def _unfrozen_by_builder(cfg: CfgNode) -> CfgNode:
    """The config for a builder of Detectron2's, whose FREEZE_AT (2 by default) would freeze more than FREEZE says.

    Where FREEZE is "all" nothing of that shows, and frozen norms stay what they are.
    """
    if cfg.MODEL.BACKBONE.FREEZE == "all" or cfg.MODEL.BACKBONE.FREEZE_AT == 0:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return cfg


def _levels_of_heads(cfg: CfgNode) -> list[str]:
    """Of res2..res5, those that the heads of the config read; all of them where it does not tell."""
    model = cfg.MODEL
    unread = _UNREAD.get(model.META_ARCHITECTURE)
    if unread is None:
        return list(STRIDE_OF)
    heads = [part for name, part in model.items() if name not in unread and isinstance(part, CfgNode)]
    asked = {level for head in heads for level in head.get("IN_FEATURES", ())}
    if model.HTC.SEMANTIC_ON:
        asked.update(model.HTC.SEMANTIC_IN_FEATURES)
    return [level for level in STRIDE_OF if level in asked] or list(STRIDE_OF)
