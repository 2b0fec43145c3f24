"""What ``train_net`` needs to know of detection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from d2_frozen.config import add_frozen_config
from detectron2.config import CfgNode


class DetectionTask:
    """See :class:`d2_frozen.tasks.Task`."""

    name = "detection"

    def add_config(self, cfg: CfgNode) -> CfgNode:
        return add_frozen_config(cfg)

    def prepare_datasets(self, cfg: CfgNode, train: bool) -> None:
        from d2_frozen.data import prepare_datasets

        prepare_datasets(cfg, train=train)

    def trainer(self) -> Any:
        from d2_frozen.engine import FrozenTrainer

        return FrozenTrainer

    def write_pictures(self, cfg: CfgNode, model: nn.Module, dataset_name: str) -> Path | None:
        from d2_frozen.detection.pictures import write_prediction_sheet

        return write_prediction_sheet(cfg, model, dataset_name, cfg.TEST.PICTURES)


TASK = DetectionTask()
