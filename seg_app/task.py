"""What ``train_net`` needs to know of semantic segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from detectron2.config import CfgNode
from seg_app.config import add_segmentation_config


class SegmentationTask:
    """See :class:`d2_frozen.tasks.Task`."""

    name = "semantic segmentation"

    def add_config(self, cfg: CfgNode) -> CfgNode:
        return add_segmentation_config(cfg)

    def prepare_datasets(self, cfg: CfgNode, train: bool) -> None:
        from seg_app.data import prepare_datasets

        prepare_datasets(cfg, train=train)

    def trainer(self) -> Any:
        from seg_app.trainer import SegmentationTrainer

        return SegmentationTrainer

    def write_pictures(self, cfg: CfgNode, model: nn.Module, dataset_name: str) -> Path | None:
        from seg_app.evaluation.pictures import write_prediction_sheet

        return write_prediction_sheet(cfg, model, dataset_name, cfg.TEST.PICTURES)


TASK = SegmentationTask()
