"""The picture sheet's layout."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from d2_frozen.detection.pictures import _grid, _pair
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances


def test_sheet_holds_every_pair_whole() -> None:
    """Four pairs in rows of three: columns are as wide as their widest pair, rows as high as the highest."""
    sizes = [(10, 30), (20, 10), (15, 40), (12, 50)]
    sheet = _grid([np.full((h, w, 3), 10 * (i + 1), np.uint8) for i, (h, w) in enumerate(sizes)])
    assert sheet.shape == (2 * (20 + 16), 50 + 10 + 40 + 3 * 16, 3)
    for i, (h, w) in enumerate(sizes):
        assert (sheet[..., 0] == 10 * (i + 1)).sum() == h * w


def test_objects_with_keypoints_are_drawn_without_them(tmp_path: Path) -> None:
    """As COCO's person files have them, and some tools' exports."""
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    annotation = {"bbox": [2, 2, 9, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    metadata = Metadata().set(thing_classes=["person"], thing_colors=[(255, 0, 0)])
    found = Instances((20, 40), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    found.pred_classes = torch.zeros(0, dtype=torch.int64)

    def pair(**more: object) -> np.ndarray:
        record = {"file_name": f"{tmp_path}/a.png", "annotations": [{**annotation, **more}]}
        return _pair(record, found, metadata)

    assert pair(keypoints=[3.0, 3.0, 2]).shape == pair().shape  # colours may be drawn
