"""Configuration: ``get_cfg``, ``CfgNode`` and ``configurable``."""

from detectron2._outside import outside_subset
from detectron2.config.compat import downgrade_config, upgrade_config
from detectron2.config.config import CfgNode, configurable, get_cfg, global_cfg, set_global_cfg

__all__ = [
    "CfgNode",
    "configurable",
    "downgrade_config",
    "get_cfg",
    "global_cfg",
    "set_global_cfg",
    "upgrade_config",
]

__getattr__ = outside_subset(__name__, ("LazyCall", "LazyConfig", "instantiate"))
