"""The compiled COCO evaluation under Detectron2's name for it; here it is faster-coco-eval's."""

from faster_coco_eval.core.faster_eval_api import COCOeval_faster as COCOeval_opt

__all__ = ["COCOeval_opt"]
