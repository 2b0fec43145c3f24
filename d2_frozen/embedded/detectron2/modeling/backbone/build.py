"""Which backbone does a config ask for?"""

from __future__ import annotations

from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

from .._lookup import registered
from .backbone import Backbone

BACKBONE_REGISTRY = Registry("BACKBONE")
BACKBONE_REGISTRY.__doc__ = """
Callables ``(cfg, input_shape: ShapeSpec) -> Backbone``, by the name in ``MODEL.BACKBONE.NAME``.
"""

_OUTSIDE = ("build_mnv2_backbone", "build_mobilenetv2_fpn_backbone")


def build_backbone(cfg, input_shape: ShapeSpec | None = None) -> Backbone:
    """Build ``MODEL.BACKBONE.NAME``.

    Args:
        cfg: the config.
        input_shape: of the images; by default as many channels as ``MODEL.PIXEL_MEAN`` has values.
    Raises:
        KeyError: no such backbone is registered.
        TypeError: what was registered did not return a :class:`Backbone`.
    """
    if input_shape is None:
        input_shape = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    name = cfg.MODEL.BACKBONE.NAME
    backbone = registered(BACKBONE_REGISTRY, name, "MODEL.BACKBONE.NAME", _OUTSIDE)(cfg, input_shape)
    if not isinstance(backbone, Backbone):
        raise TypeError(
            f"MODEL.BACKBONE.NAME: {name} returned a {type(backbone).__name__}; it must return a subclass of "
            "detectron2.modeling.Backbone"
        )
    return backbone
