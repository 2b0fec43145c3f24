"""Which model does a config ask for?"""

from __future__ import annotations

import torch
from torch import nn

from detectron2.utils.logger import _log_api_usage
from detectron2.utils.registry import Registry

from .._lookup import registered

META_ARCH_REGISTRY = Registry("META_ARCH")
META_ARCH_REGISTRY.__doc__ = """
Callables ``(cfg) -> nn.Module`` by the name in ``MODEL.META_ARCHITECTURE``.
"""

_OUTSIDE = ("FCOS", "PanopticDeepLab", "PanopticFPN", "RetinaNet")


def build_model(cfg) -> nn.Module:
    """Build ``MODEL.META_ARCHITECTURE`` on ``MODEL.DEVICE``; weights are as initialised, none are loaded."""
    name = cfg.MODEL.META_ARCHITECTURE
    model = registered(META_ARCH_REGISTRY, name, "MODEL.META_ARCHITECTURE", _OUTSIDE)(cfg)
    model.to(torch.device(cfg.MODEL.DEVICE))
    _log_api_usage(f"modeling.meta_arch.{name}")
    return model
