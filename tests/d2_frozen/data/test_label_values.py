"""The values of a label map are those of numpy's unique, whoever counts them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from d2_frozen.data.label_values import LABEL_VALUES, values_in, values_of


@pytest.mark.parametrize(
    "labels",
    [
        np.array([[3, 0, 3], [255, 7, 0]], dtype=np.uint8),
        np.arange(60, dtype=np.uint8).reshape(6, 10)[::-2, 1:7:3],  # turned, and with gaps
        np.array([[65535, 2], [2, 65535]], dtype=np.int64),
        np.array([[300, 2], [2, 0]], dtype=np.float32)[:, ::-1],  # mirrored ids above 255
        np.array([[70000, -1], [5, 70000]], dtype=np.int64),  # too large, or negative, to be counted
        np.zeros((0, 4), dtype=np.int64),
    ],
)
def test_distinct_values_in_order(labels: np.ndarray) -> None:
    expected = np.unique(labels).tolist()
    assert values_of(labels) == values_of(torch.from_numpy(labels.copy())) == expected


def test_what_a_mapper_has_counted_is_not_counted_again() -> None:
    sample = {"sem_seg": torch.tensor([[4, 1], [1, 4]])}
    assert values_in(sample) == [1, 4]
    assert values_in({**sample, LABEL_VALUES: [2]}) == [2]
