"""Which proposal generator does a config ask for?"""

from __future__ import annotations

from torch import nn

from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

from .._lookup import registered

PROPOSAL_GENERATOR_REGISTRY = Registry("PROPOSAL_GENERATOR")
PROPOSAL_GENERATOR_REGISTRY.__doc__ = """
Callables ``(cfg, input_shape: dict[str, ShapeSpec]) -> nn.Module`` by the name in
``MODEL.PROPOSAL_GENERATOR.NAME``. The module is called with (images, features, gt_instances) and returns
(proposals, losses) as :class:`RPN` does.
"""


def build_proposal_generator(cfg, input_shape: dict[str, ShapeSpec]) -> nn.Module | None:
    """Build ``MODEL.PROPOSAL_GENERATOR.NAME``; None for "PrecomputedProposals", which come with the data."""
    name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if name == "PrecomputedProposals":
        return None
    builder = registered(PROPOSAL_GENERATOR_REGISTRY, name, "MODEL.PROPOSAL_GENERATOR.NAME", ("RRPN",))
    return builder(cfg, input_shape)
