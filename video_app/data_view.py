"""Labelled clips as strips of frames, and how many there are of each class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from d2_frozen.detection.data_view import shortened
from d2_frozen.detection.pictures import spread
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from video_app.clips.mapper import ClipMapper
from video_app.evaluation.evaluator import class_names
from video_app.evaluation.pictures import clip_strip, middle_view


class VideoData:
    """See :class:`d2_frozen.tasks.DataView`."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg

    def labelled(self, dataset_name: str, count: int) -> list[np.ndarray]:
        records = DatasetCatalog.get(dataset_name)
        classes = self._classes(dataset_name)
        mapper = ClipMapper.from_config(self.cfg, is_train=False)
        try:
            items = [mapper(records[i]) for i in spread(len(records), count)]
            return [
                clip_strip(classes[item["label"]], middle_view(mapper, item), _said(item))
                for item in items
                if item is not None
            ]
        finally:
            mapper.decoder.close()

    def sample(self, sample: dict[str, Any]) -> list[np.ndarray]:
        classes = self._classes(self.cfg.DATASETS.TRAIN[0])
        label = sample["label"]
        name = classes[label] if label < len(classes) else str(label)
        views = sample["video"].flip(2) if self.cfg.INPUT.FORMAT == "BGR" else sample["video"]
        return [clip_strip(name, view, _said(sample)) for view in views]

    def dataset_facts(self, dataset_name: str) -> str:
        records, classes = DatasetCatalog.get(dataset_name), self._classes(dataset_name)
        of_class = Counter(record["label"] for record in records)
        rows = [
            [classes[k], of_class[k]] for k in sorted(range(len(classes)), key=lambda k: (-of_class[k], k))
        ]
        line = f"{dataset_name}: {len(records)} videos"
        return "\n".join([line, tabulate(shortened(rows), headers=["class", "videos"])])

    def sample_facts(self, samples: Sequence[dict[str, Any]]) -> str:
        frames, side = samples[0]["video"].shape[1], samples[0]["video"].shape[-1]
        first_to_last = [clip[-1] - clip[0] for sample in samples for clip in sample["frame_indices"]]
        low, middle, high = np.percentile(first_to_last, (0, 50, 100))
        return (
            f"{len(samples)} training samples of {frames} frames, {side} px; from the first to the last it is "
            f"{low:.0f} to {high:.0f} frames of the file ({middle:.0f} in the median)"
        )

    def _classes(self, dataset_name: str) -> list[str]:
        return class_names(dataset_name, self.cfg.MODEL.VIDEO_HEAD.NUM_CLASSES)


def _said(item: dict[str, Any]) -> str:
    return f"cannot be read: {item['bad']}" if "bad" in item else Path(item["file_name"]).name
