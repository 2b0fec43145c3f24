"""Metrics of action recognition, predictions as files, contact sheets."""

from video_app.evaluation.evaluator import TopKEvaluator

__all__ = ["TopKEvaluator"]
