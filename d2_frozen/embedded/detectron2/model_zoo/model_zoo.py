"""Config, weights or finished model for a name such as
"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml".
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from detectron2._outside import outside_message
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.model_zoo.catalog import CHECKPOINTS, PREFIX
from detectron2.modeling import build_model

# The d2_frozen package around the embedded engine; its zoo lies in the package or, in a checkout, beside it.
_PACKAGE = Path(__file__).resolve().parents[3]
_ZOO_FOLDERS = (_PACKAGE / "configs" / "zoo", _PACKAGE.parent / "configs" / "zoo")


def get_checkpoint_url(config_path: str) -> str:
    """Address of the published weights of a config.

    Raises:
        RuntimeError: there are none, or they are for a model outside the subset.
    """
    name = config_path.removesuffix(".yaml").removesuffix(".py")
    if name not in CHECKPOINTS:
        raise RuntimeError(
            f"no weights are known for {config_path}. " + outside_message("Detectron2's full model zoo")
        )
    return f"{PREFIX}{name}/{CHECKPOINTS[name]}"


def get_config_file(config_path: str) -> str:
    """Local path of a config of the zoo.

    Raises:
        RuntimeError: it does not ship with d2_frozen.
    """
    for folder in _ZOO_FOLDERS:
        file = folder / config_path
        if file.is_file():
            return str(file)
    raise RuntimeError(
        f"no config {config_path} in {' or '.join(map(str, _ZOO_FOLDERS))}. "
        + outside_message("Detectron2's full model zoo")
    )


def get_config(config_path: str, trained: bool = False) -> CfgNode:
    """The config of a model of the zoo.

    Args:
        trained: MODEL.WEIGHTS is the trained model; otherwise what its training starts from.
    """
    if config_path.endswith(".py"):
        raise NotImplementedError(outside_message(f"{config_path}: LazyConfig"))
    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(config_path))
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_url(config_path)
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """A model of the zoo, its weights loaded, in training mode.

    Args:
        trained: see ``get_config``.
        device: default: that of the config, or "cpu" where there is no GPU.
    """
    cfg = get_config(config_path, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    elif not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
