"""Prediction with any number of heads, one pass of each frozen backbone per picture."""

from d2_frozen.prediction.heads import Head, build_head, load_heads
from d2_frozen.prediction.predictor import Predictor

__all__ = ["Head", "Predictor", "build_head", "load_heads"]
