"""Boxes, masks and batches against geometry that can be checked by hand."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from detectron2.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    ImageList,
    Instances,
    Keypoints,
    PolygonMasks,
    ROIMasks,
    heatmaps_to_keypoints,
    pairwise_iou,
    pairwise_point_box_distance,
)
from detectron2.structures.boxes import matched_pairwise_iou, pairwise_intersection

SQUARE = np.array([2.0, 2.0, 6.0, 2.0, 6.0, 6.0, 2.0, 6.0])  # pixels 2..5 on both axes


def test_iou_of_shifted_squares():
    """Two 10x10 squares, 5 apart on one axis: intersection 50, union 150."""
    a, b = Boxes([[0, 0, 10, 10]]), Boxes([[5, 0, 15, 10], [20, 20, 30, 30], [0, 0, 10, 10]])
    assert pairwise_intersection(a, b).tolist() == [[50, 0, 100]]
    assert torch.allclose(pairwise_iou(a, b), torch.tensor([[1 / 3, 0, 1]]))
    assert torch.allclose(matched_pairwise_iou(a, b[:1]), torch.tensor([1 / 3]))


def test_iou_with_no_boxes_and_with_empty_boxes():
    point = Boxes([[3, 3, 3, 3]])
    assert pairwise_iou(Boxes([]), point).shape == (0, 1)
    assert pairwise_iou(point, Boxes([])).shape == (1, 0)
    assert pairwise_iou(point, point).tolist() == [[0]]  # 0/0 is no overlap


def test_point_to_box_distances():
    inside, outside = pairwise_point_box_distance(
        torch.tensor([[3.0, 4.0], [20.0, 4.0]]), Boxes([[1, 1, 9, 11]])
    )[:, 0]
    assert inside.tolist() == [2, 3, 6, 7]
    assert outside.tolist() == [19, 3, -11, 7]


def test_rotated_boxes_become_their_hull():
    """A 4x2 box turned by 90 degrees is 2x4; by 45 degrees both sides are 6/sqrt(2)."""
    turned = BoxMode.convert([10.0, 10.0, 4.0, 2.0, 90.0], BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
    assert np.allclose(turned, [9, 8, 11, 12])
    x0, _, x1, _ = BoxMode.convert([0.0, 0.0, 4.0, 2.0, 45.0], BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
    assert math.isclose(x1 - x0, 6 / math.sqrt(2), rel_tol=1e-6)


@pytest.mark.parametrize("boxes", [[[1, 2, 3, 4]], ([1, 2, 3, 4],), [1, 2, 3], []])
def test_a_list_is_one_box(boxes):
    with pytest.raises(AssertionError):
        BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


def test_image_list_gives_the_images_back():
    images = [torch.rand(3, 5, 9), torch.rand(3, 7, 4)]
    batch = ImageList.from_tensors(images, size_divisibility=4, pad_value=-1.0)
    assert batch.tensor.shape == (2, 3, 8, 12)
    assert all(torch.equal(back, image) for back, image in zip(batch, images))
    assert (batch.tensor == -1).sum() == 3 * (2 * 8 * 12 - 5 * 9 - 7 * 4)


def test_instances_survive_copy_and_pickle():
    one = Instances((4, 5), scores=torch.tensor([0.5, 0.25]), boxes=Boxes(torch.zeros(2, 4)))
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert other.image_size == (4, 5)
        assert other.scores.tolist() == [0.5, 0.25]
        assert len(other[other.scores > 0.3]) == 1


@pytest.mark.parametrize("size", [4, 8])
def test_crop_of_a_square_covers_what_it_covers(size: int):
    """A square crop from (0, 0) to (8, 8): the object fills its middle half."""
    wanted = torch.zeros(size, size, dtype=torch.bool)
    wanted[size // 4 : 3 * size // 4, size // 4 : 3 * size // 4] = True
    polygons = PolygonMasks([[SQUARE]])
    bits = BitMasks.from_polygon_masks(polygons, 10, 12)
    box = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    assert torch.equal(polygons.crop_and_resize(box, size)[0], wanted)
    assert torch.equal(bits.crop_and_resize(box, size)[0], wanted)


def test_crops_of_many_large_masks_do_not_depend_on_each_other():
    bits = torch.zeros(5, 1100, 1000, dtype=torch.bool)
    boxes = torch.tensor([[100.0 * i, 50.0, 100.0 * i + 40.0, 90.0] for i in range(5)])
    for i in range(5):
        bits[i, 50 : 60 + 5 * i, 100 * i : 100 * i + 40] = True
    together = BitMasks(bits).crop_and_resize(boxes, 8)
    assert together.sum(dim=(1, 2)).tolist() == [8 * (2 + i) for i in range(5)]
    assert torch.equal(together[3:4], BitMasks(bits[3:4]).crop_and_resize(boxes[3:4], 8))


def test_mask_areas_and_boxes():
    polygons = PolygonMasks([[SQUARE], [SQUARE + 10, SQUARE]])
    assert polygons.area().tolist() == [16, 32]
    assert polygons.get_bounding_boxes().tensor.tolist() == [[2, 2, 6, 6], [2, 2, 16, 16]]
    bits = BitMasks.from_polygon_masks(polygons, 20, 30)
    assert bits.tensor.sum(dim=(1, 2)).tolist() == [16, 32]
    assert torch.equal(bits.get_bounding_boxes().tensor, polygons.get_bounding_boxes().tensor)
    none = BitMasks(torch.zeros(0, 20, 30))
    assert none.get_bounding_boxes().tensor.shape == (0, 4) and none.nonempty().shape == (0,)


def test_polygons_are_copied():
    mine = SQUARE.copy()
    polygons = PolygonMasks([[mine]])
    mine[:] = 0
    polygons.crop_and_resize(torch.tensor([[1.0, 1.0, 5.0, 5.0]]), 4)
    assert polygons.polygons[0][0].tolist() == SQUARE.tolist()


def test_roi_masks_fill_their_boxes():
    full = ROIMasks(torch.ones(2, 14, 14)).to_bitmasks(Boxes([[1, 2, 4, 8], [0, 0, 20, 10]]), 10, 20)
    assert full.tensor.sum(dim=(1, 2)).tolist() == [18, 200]
    assert full[0].get_bounding_boxes().tensor.tolist() == [[1, 2, 4, 8]]


def test_keypoints_to_heatmap_cells_and_back():
    """A box of 8x8 pixels, 8x8 cells: a keypoint's cell is its pixel."""
    box = torch.tensor([[10.0, 20.0, 18.0, 28.0]])
    points = Keypoints([[[12.5, 23.5, 2], [18.0, 28.0, 2], [11.5, 21.5, 0], [30.0, 21.5, 2]]])
    cell, valid = points.to_heatmap(box, 8)
    assert valid.tolist() == [
        [1, 1, 0, 0]
    ]  # the far corner counts, the unlabelled and the distant one do not
    assert cell.tolist() == [[3 * 8 + 2, 7 * 8 + 7, 0, 0]]
    maps = torch.zeros(1, 4, 64).scatter(2, cell[..., None], 20.0).reshape(1, 4, 8, 8)
    found = heatmaps_to_keypoints(maps, box)
    assert torch.allclose(found[0, 0, :2], torch.tensor([12.5, 23.5]))
    assert torch.allclose(found[0, 0, 2:], torch.tensor([20.0, 1.0]))
