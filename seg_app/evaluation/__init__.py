"""Metrics of label maps, testing at several sizes and piece by piece, pictures."""

from seg_app.evaluation.evaluator import LabelMapEvaluator
from seg_app.evaluation.inference import LabelModel, MultiScaleModel, SlidingWindowModel, sliding_window_of

__all__ = ["LabelMapEvaluator", "LabelModel", "MultiScaleModel", "SlidingWindowModel", "sliding_window_of"]
