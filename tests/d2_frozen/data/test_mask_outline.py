"""Outlines rasterise back to exactly the mask they came from."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from d2_frozen.data.mask_outline import mask_to_polygons


def rasterise(polygons, height, width):
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)


def shoelace(polygon):
    x, y = np.array(polygon).reshape(-1, 2).T
    return abs(0.5 * (np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))


def test_rectangle_has_four_corners():
    mask = np.zeros((6, 8), bool)
    mask[1:4, 2:7] = True
    (polygon,) = mask_to_polygons(mask)
    assert sorted(zip(polygon[::2], polygon[1::2])) == [(2, 1), (2, 4), (7, 1), (7, 4)]
    assert mask_to_polygons(np.zeros((3, 3), bool)) == []


def test_parts_that_touch_at_a_corner_stay_apart():
    assert len(mask_to_polygons(np.eye(3, dtype=bool))) == 3


def test_frame_with_island():
    """A frame around an island: two polygons, and the frame's area leaves out its hole."""
    mask = np.ones((9, 9), bool)
    mask[2:7, 2:7] = False
    mask[4, 4] = True
    polygons = mask_to_polygons(mask)
    assert sorted(shoelace(p) for p in polygons) == [1, 81 - 25]
    assert np.array_equal(rasterise(polygons, 9, 9), mask)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.6, 0.8, 0.95])
def test_noise_comes_back_exactly(density):
    """Noise has every case: holes in holes, holes at corners, parts at the border."""
    for seed in range(20):
        mask = np.random.RandomState(seed).random_sample((17, 23)) < density
        polygons = mask_to_polygons(mask)
        assert np.array_equal(rasterise(polygons, 17, 23), mask)
        assert sum(shoelace(p) for p in polygons) == mask.sum()
