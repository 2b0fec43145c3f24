"""Evaluators: feed them inputs and outputs, get a nested dict of metrics back."""

from detectron2._outside import outside_subset

from .coco_evaluation import COCOEvaluator
from .evaluator import DatasetEvaluator, DatasetEvaluators, inference_context, inference_on_dataset
from .sem_seg_evaluation import SemSegEvaluator
from .testing import print_csv_format, verify_results

__all__ = [
    "COCOEvaluator",
    "DatasetEvaluator",
    "DatasetEvaluators",
    "SemSegEvaluator",
    "inference_context",
    "inference_on_dataset",
    "print_csv_format",
    "verify_results",
]

__getattr__ = outside_subset(
    __name__,
    (
        "CityscapesInstanceEvaluator",
        "CityscapesSemSegEvaluator",
        "COCOPanopticEvaluator",
        "LVISEvaluator",
        "PascalVOCDetectionEvaluator",
        "RotatedCOCOEvaluator",
    ),
)
