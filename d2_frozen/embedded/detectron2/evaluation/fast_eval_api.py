"""The compiled COCO evaluation under Detectron2's name for it; here it is faster-coco-eval's."""

from __future__ import annotations

from typing import Any

from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from pycocotools.cocoeval import COCOeval

__all__ = ["COCOeval_opt"]

_NEEDED_OF_OBJECTS = {"id", "image_id", "category_id", "area", "iscrowd"}
_NEEDED_OF_DETECTIONS = {"id", "image_id", "category_id", "area", "score"}


class COCOeval_opt(COCOeval):
    """pycocotools' ``COCOeval`` with boxes and masks evaluated in compiled code; ``evalImgs`` stays empty.

    Keypoints, class-agnostic evaluation, and annotations that lack something are left to pycocotools, so that results
    and errors are its own.
    """

    _compiled: COCOeval_faster | None = None

    def evaluate(self) -> None:
        """Match detections with objects; the parameters are in ``self.params``, as for pycocotools."""
        self._compiled = None
        if not self._is_usual():
            super().evaluate()
            return
        compiled = COCOeval_faster(self.cocoGt, self.cocoDt, self.params.iouType, print_function=_silent)
        for name in ("imgIds", "catIds", "iouThrs", "recThrs", "maxDets", "areaRng", "areaRngLbl"):
            setattr(compiled.params, name, getattr(self.params, name))
        compiled.evaluate()
        self._compiled = compiled

    def accumulate(self, p: Any = None) -> None:
        """Precision and recall into ``self.eval``."""
        if self._compiled is None:
            super().accumulate(p)
            return
        self._compiled.accumulate()
        self.eval = {**self._compiled.eval, "params": self.params}

    def _is_usual(self) -> bool:
        params = self.params
        if params.iouType not in ("bbox", "segm") or not params.useCats:
            return False
        lists = (params.imgIds, params.iouThrs, params.recThrs, params.maxDets, params.areaRng)
        if not all(len(values) for values in lists) or len(params.areaRng) != len(params.areaRngLbl):
            return False
        shape = "bbox" if params.iouType == "bbox" else "segmentation"
        return all(
            needed | {shape} <= annotation.keys() and len(annotation[shape])
            for side, needed in ((self.cocoGt, _NEEDED_OF_OBJECTS), (self.cocoDt, _NEEDED_OF_DETECTIONS))
            for annotation in side.anns.values()
        )


def _silent(*_: object) -> None:
    """For the progress texts of the evaluation library."""
