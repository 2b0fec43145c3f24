"""Which task is a config of? MODEL.META_ARCHITECTURE says it; the app of that task is imported only then.

An app is a package with a module ``task`` in which an object ``TASK`` has the attributes of :class:`Task`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from detectron2.config import CfgNode, get_cfg

# Meta-architecture -> package of the app. All others are detection's (R-CNNs, Detectron2's own models).
APPS = {
    "FrozenSegmentor": "seg_app",
    "FrozenVideoClassifier": "video_app",
}
DETECTION = "d2_frozen.detection"


class Task(Protocol):
    """What ``train_net`` needs to know of a task. Nothing of it is imported before it is used."""

    # In words, for messages: "detection".
    name: str

    def add_config(self, cfg: CfgNode) -> CfgNode:
        """Add the keys of the task to Detectron2's, in place, and register its models; returns ``cfg``."""

    def prepare_datasets(self, cfg: CfgNode, train: bool) -> None:
        """Register and check the data that ``cfg`` uses, and fill in what is taken from it (class counts)."""

    def trainer(self) -> Any:
        """The trainer's class: :class:`d2_frozen.engine.FrozenTrainer` or one derived from it."""

    def write_pictures(self, cfg: CfgNode, model: nn.Module, dataset_name: str) -> Path | None:
        """Predictions beside the truth, as one picture; None where the config asks for none."""


def task_of(cfg: CfgNode) -> Task:
    """The task of a complete config."""
    return _load(APPS.get(cfg.MODEL.META_ARCHITECTURE, DETECTION))


def read_config(config_file: str | Path, options: Iterable[str] = ()) -> CfgNode:
    """A yaml file ("" for none) and KEY VALUE options over the defaults of their task.

    Raises:
        KeyError, AssertionError: unknown key in the file / in the options.
    """
    options = list(options)
    cfg = _load(APPS.get(_meta_architecture(config_file, options) or "", DETECTION)).add_config(get_cfg())
    if config_file:
        cfg.merge_from_file(str(config_file))
    cfg.merge_from_list(options)
    return cfg


def _meta_architecture(config_file: str | Path, options: list[str]) -> str | None:
    """As the options or the file with its bases say it; the keys that they may have depend on it."""
    named = dict(zip(options[::2], options[1::2])).get("MODEL.META_ARCHITECTURE")
    if named is None and config_file:
        content = CfgNode.load_yaml_with_base(str(config_file))
        named = (content.get("MODEL") or {}).get("META_ARCHITECTURE")
    return named


def _load(app: str) -> Task:
    return importlib.import_module(f"{app}.task").TASK
