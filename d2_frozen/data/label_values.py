"""Which values occur in a label map? Counted where samples are made, so that no model has to look at each pixel for it.

On a GPU, a model that counts them would wait for everything before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

# Key of a sample beside "sem_seg": the list of its values, each once, in order. Whoever changes "sem_seg" drops it.
LABEL_VALUES = "sem_seg_values"
_COUNTABLE = 1 << 16


def values_of(labels: Tensor | np.ndarray) -> list[int]:
    """Distinct values of a map of integers, in order."""
    if isinstance(labels, np.ndarray) and labels.dtype == np.uint8 and labels.size:
        counts = cv2.calcHist([np.ascontiguousarray(labels)], [0], None, [256], [0, 256])
        return np.flatnonzero(counts).tolist()
    if isinstance(labels, np.ndarray):
        labels = np.ascontiguousarray(labels)  # a mirrored one goes backwards, which torch does not take
    labels = torch.as_tensor(labels).to(torch.int64)  # torch counts no uint16
    if labels.numel() == 0:
        return []
    low, high = (int(x) for x in labels.aminmax())
    if low < 0 or high >= _COUNTABLE:
        return labels.unique().tolist()
    # Counting is faster than unique()'s sort.
    return torch.bincount(labels.flatten()).nonzero()[:, 0].tolist()


def values_in(sample: Mapping[str, Any]) -> list[int]:
    """Those of its "sem_seg", as its mapper has counted them; else they are counted now."""
    counted = sample.get(LABEL_VALUES)
    return values_of(sample["sem_seg"]) if counted is None else counted
