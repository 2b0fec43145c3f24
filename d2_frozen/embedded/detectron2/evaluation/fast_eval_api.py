"""The compiled COCO evaluation under Detectron2's name for it; here it is faster-coco-eval's."""

from __future__ import annotations

from typing import Any

from faster_coco_eval.core.faster_eval_api import COCOeval_faster

__all__ = ["COCOeval_opt"]


class COCOeval_opt(COCOeval_faster):
    """Takes the place of ``pycocotools.cocoeval.COCOeval``, with ground truth and results of pycocotools too."""

    def __init__(self, cocoGt: Any = None, cocoDt: Any = None, iouType: str = "segm", **options: Any) -> None:
        if cocoGt is not None and not hasattr(cocoGt, "cat_img_map"):
            # Which categories have keypoints: an index that pycocotools has not got, and takes all instead.
            cocoGt.cat_img_map = dict.fromkeys(cocoGt.getCatIds())
        super().__init__(cocoGt, cocoDt, iouType, **options)
