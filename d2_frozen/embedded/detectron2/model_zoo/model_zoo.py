"""Config, weights or finished model for a name such as
"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml".
"""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from torch import nn

from detectron2._outside import outside_message
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.model_zoo.catalog import CHECKPOINTS, PREFIX, config_file_name
from detectron2.modeling import build_model

# The package around the embedded engine: an installed one has the zoo's configs inside, a checkout beside it.
_PACKAGE = Path(__file__).resolve().parents[3]
_ZOO_FOLDERS = (_PACKAGE.parent / "configs" / "zoo", _PACKAGE / "configs" / "zoo")


def get_checkpoint_url(config_path: str) -> str:
    """Address of the published weights of a config.

    Raises:
        RuntimeError: no such config in the subset, or no weights were published for it.
    """
    name = _known_name(config_path)
    if not CHECKPOINTS[name]:
        raise RuntimeError(f"Detectron2's model zoo has no weights for {config_path}, only the config.")
    return f"{PREFIX}{name}/{CHECKPOINTS[name]}"


def get_config_file(config_path: str) -> str:
    """Local path of a config of the zoo.

    Args:
        config_path: as in Detectron2's ``configs`` folder, e.g.
            "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml".
    Raises:
        RuntimeError: no such config in the subset, or its file is gone.
    """
    if config_path.endswith(".yaml"):
        _known_name(config_path)
        for folder in _ZOO_FOLDERS:
            file = folder / config_file_name(config_path)
            if file.is_file():
                return str(file)
        raise RuntimeError(
            f"the file of {config_path} is missing in {' and '.join(map(str, _ZOO_FOLDERS))}. Install d2_frozen "
            "again, or use its whole repository."
        )
    raise RuntimeError(f"{config_path!r}: configs of the zoo end in .yaml here. " + _outside())


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


def _known_name(config_path: str) -> str:
    name = config_path.removesuffix(".yaml").removesuffix(".py")
    if name in CHECKPOINTS:
        return name
    close = difflib.get_close_matches(name, CHECKPOINTS, n=1, cutoff=0.9)
    hint = f"Did you mean {close[0]}.yaml? " if close else ""
    raise RuntimeError(f"{config_path} is not in this model zoo. {hint}{_outside()}")


def _outside() -> str:
    return outside_message("Detectron2's full model zoo")
