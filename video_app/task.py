"""What ``train_net`` and ``predict`` need to know of video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from d2_frozen.tasks import Classes, ClipPrediction, DataView
from detectron2.config import CfgNode
from video_app.config import add_video_config


class VideoTask:
    """See :class:`d2_frozen.tasks.Task`."""

    name = "action recognition"

    def add_config(self, cfg: CfgNode) -> CfgNode:
        return add_video_config(cfg)

    def prepare_datasets(self, cfg: CfgNode, train: bool) -> None:
        from video_app.data.prepare import prepare_datasets

        prepare_datasets(cfg, train=train)

    def trainer(self) -> Any:
        from video_app.trainer import VideoTrainer

        return VideoTrainer

    def write_pictures(self, cfg: CfgNode, model: nn.Module, dataset_name: str) -> Path | None:
        from video_app.evaluation.pictures import write_contact_sheet

        return write_contact_sheet(cfg, model, dataset_name, cfg.TEST.PICTURES)

    def classes(self, cfg: CfgNode) -> Classes | None:
        from video_app.evaluation.evaluator import class_names

        # Lists with labels only know the classes up to the highest of them.
        count = cfg.MODEL.VIDEO_HEAD.NUM_CLASSES
        known = [class_names(name, count) for name in cfg.DATASETS.TRAIN]
        names = next((names for names in known if len(names) == count), None)
        return None if names is None else Classes(names, list(range(len(names))))

    def generated_batch(self, cfg: CfgNode, count: int) -> list[dict[str, Any]]:
        from video_app.data.generated import generated_clips

        return generated_clips(
            cfg.VIDEO.NUM_FRAMES, cfg.VIDEO.CROP_SIZE, count, cfg.MODEL.VIDEO_HEAD.NUM_CLASSES
        )

    def data_view(self, cfg: CfgNode) -> DataView:
        from video_app.data_view import VideoData

        return VideoData(cfg)

    def prediction(self, cfg: CfgNode, classes: Classes | None) -> ClipPrediction:
        from video_app.prediction import VideoPrediction

        return VideoPrediction(cfg, classes)


TASK = VideoTask()
