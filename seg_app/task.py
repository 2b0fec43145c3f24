"""What ``train_net`` and ``predict`` need to know of semantic segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from d2_frozen.tasks import Classes, DataView, Prediction
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

    def classes(self, cfg: CfgNode) -> Classes | None:
        from seg_app.data.prepare import classes_of

        return next((found for name in cfg.DATASETS.TRAIN if (found := classes_of(name))), None)

    def generated_batch(self, cfg: CfgNode, count: int) -> list[dict[str, Any]]:
        from d2_frozen.data.generated import generated_label_batch, training_side

        classes, channels = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, len(cfg.MODEL.PIXEL_MEAN)
        return generated_label_batch(training_side(cfg), count, classes, channels)

    def data_view(self, cfg: CfgNode) -> DataView:
        from seg_app.data_view import SegmentationData

        return SegmentationData(cfg)

    def prediction(self, cfg: CfgNode, classes: Classes | None) -> Prediction:
        from seg_app.prediction import SegmentationPrediction

        return SegmentationPrediction(cfg, classes)


TASK = SegmentationTask()
