"""What ``train_net`` and ``predict`` need to know of detection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from d2_frozen.config import add_frozen_config
from d2_frozen.tasks import Classes, DataView, Prediction
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

    def classes(self, cfg: CfgNode) -> Classes | None:
        from d2_frozen.data.prepare import classes_of

        return next((found for name in cfg.DATASETS.TRAIN if (found := classes_of(name))), None)

    def generated_batch(self, cfg: CfgNode, count: int) -> list[dict[str, Any]]:
        from d2_frozen.data.generated import generated_batch, training_side

        heads = cfg.MODEL.ROI_HEADS
        # An untrained network proposes nothing that fits an object, so that only the objects themselves are positive
        # RoIs. A trained one proposes up to this share, which mask heads then work on.
        positive = max(1, round(heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION))
        channels = len(cfg.MODEL.PIXEL_MEAN)
        batch = generated_batch(training_side(cfg), count, heads.NUM_CLASSES, positive, channels)
        if cfg.MODEL.HTC.SEMANTIC_ON:
            for sample in batch:
                sample["sem_seg"] = sample["image"][0].long() % cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        return batch

    def data_view(self, cfg: CfgNode) -> DataView:
        from d2_frozen.detection.data_view import DetectionData

        return DetectionData(cfg)

    def prediction(self, cfg: CfgNode, classes: Classes | None) -> Prediction:
        from d2_frozen.detection.prediction import DetectionPrediction

        return DetectionPrediction(cfg, classes)


TASK = DetectionTask()
