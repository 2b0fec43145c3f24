"""Anchors, deltas, matching, sampling, pooling and postprocessing against what can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import (
    Box2BoxTransform,
    Box2BoxTransformLinear,
    _dense_box_regression_loss,
)
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances


def test_anchors_sit_on_their_cells():
    """Size 8, stride 4: centres at offset * 4, then every 4 pixels, row by row."""
    generator = DefaultAnchorGenerator(sizes=[[8]], aspect_ratios=[[1.0]], strides=[4], offset=0.5)
    (anchors,) = generator([torch.zeros(1, 1, 2, 3)])
    assert anchors.get_centers().tolist() == [[2, 2], [6, 2], [10, 2], [2, 6], [6, 6], [10, 6]]
    assert (anchors.area() == 64).all()


def test_aspect_ratio_is_height_over_width_at_equal_area():
    generator = DefaultAnchorGenerator(sizes=[[10]], aspect_ratios=[[0.25, 4.0]], strides=[4])
    flat, tall = generator.generate_cell_anchors([10], [0.25, 4.0])
    assert flat.tolist() == [-10, -2.5, 10, 2.5]
    assert tall.tolist() == [-2.5, -10, 2.5, 10]


def test_deltas_by_hand():
    """From [0,0,10,20] to [5,0,25,20]: centre moves 10 = one width, width doubles."""
    transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    source, target = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 0, 25, 20]])
    deltas = transform.get_deltas(source, target)
    assert torch.allclose(deltas, torch.tensor([[10.0, 0, 5 * torch.log(torch.tensor(2.0)), 0]]))
    assert torch.allclose(transform.apply_deltas(deltas, source), target)


@pytest.mark.parametrize("normalize", [False, True])
def test_linear_deltas_lead_back(normalize: bool):
    transform = Box2BoxTransformLinear(normalize_by_size=normalize)
    source, target = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[1.0, 2, 7, 18]])
    deltas = transform.get_deltas(source, target)
    unit = torch.tensor([10.0, 20, 10, 20]) if normalize else torch.ones(4)
    assert torch.allclose(deltas, torch.tensor([[4.0, 8, 2, 8]]) / unit)
    assert torch.allclose(transform.apply_deltas(deltas, source), target)


@pytest.mark.parametrize("kind", ["smooth_l1", "giou", "diou", "ciou"])
def test_dense_loss_looks_at_the_foreground_only(kind: str):
    transform = Box2BoxTransform((1.0, 1, 1, 1))
    anchors = torch.tensor([[0.0, 0, 10, 10], [20.0, 20, 40, 40], [5.0, 5, 25, 15]])
    truth = [anchors + 2, anchors - 1]
    exact = torch.stack([transform.get_deltas(anchors, boxes) for boxes in truth])
    foreground = torch.tensor([[True, False, True], [False, False, True]])
    wrong_elsewhere = (exact + (~foreground)[..., None] * 3.0).requires_grad_(True)
    per_level = [wrong_elsewhere[:, :2], wrong_elsewhere[:, 2:]]
    levels = [Boxes(anchors[:2]), Boxes(anchors[2:])]
    loss = _dense_box_regression_loss(levels, transform, per_level, truth, foreground, kind)
    assert loss.item() == pytest.approx(0, abs=1e-5)
    off = [level + 0.1 for level in per_level]
    _dense_box_regression_loss(levels, transform, off, truth, foreground, kind).backward()
    assert torch.equal(wrong_elsewhere.grad.abs().sum(dim=2) > 0, foreground)


def test_low_quality_match_takes_every_tie():
    """Ground truth 1 fits nothing well; both of its equally best predictions become foreground."""
    quality = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.0, 0.2, 0.2, 0.1]])
    matches, labels = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)(quality)
    assert labels.tolist() == [1, 1, 1, 0]
    assert matches.tolist() == [0, 1, 1, 1]
    assert Matcher([0.3, 0.7], [0, -1, 1])(quality)[1].tolist() == [1, 0, 0, 0]


def test_sampling_uses_the_generator_for_foreground_first():
    labels = torch.tensor([0, 1, 1, 0, -1, 0, 1, 0])
    torch.manual_seed(5)
    foreground, background = subsample_labels(labels, 4, 0.5, 0)
    torch.manual_seed(5)
    first, second = torch.randperm(3)[:2], torch.randperm(4)[:2]
    assert foreground.tolist() == torch.tensor([1, 2, 6])[first].tolist()
    assert background.tolist() == torch.tensor([0, 3, 5, 7])[second].tolist()


def test_level_borders():
    """FPN's equation 1: 224 pixels is level 4, every doubling one more, the border belongs above."""
    sides = torch.tensor([1.0, 111.0, 112.0, 223.0, 224.0, 447.0, 448.0, 5000.0])
    boxes = torch.stack((sides * 0, sides * 0, sides, sides), dim=1)
    levels = assign_boxes_to_levels([Boxes(boxes[:3]), Boxes(boxes[3:])], 2, 5, 224, 4) + 2
    assert levels.tolist() == [2, 2, 3, 3, 4, 4, 5, 5]


def test_pooled_boxes_keep_their_order():
    """Maps hold image * 10 + level, so each box says where it was pooled."""
    maps = [
        (torch.tensor([0.0, 10.0]) + level)[:, None, None, None].expand(
            2, 1, 256 // 2**level, 256 // 2**level
        )
        for level in (2, 3, 4)
    ]
    maps = [m.clone().requires_grad_(True) for m in maps]
    large, small, middle = [10.0, 10, 230, 240], [50.0, 50, 60, 62], [20.0, 20, 150, 140]
    boxes = [Boxes([small, large]), Boxes([middle, small, large])]
    pooled = ROIPooler(3, (1 / 4, 1 / 8, 1 / 16), 2, "ROIAlignV2")(maps, boxes)
    assert pooled.amax(dim=(1, 2, 3)).tolist() == [2, 4, 13, 12, 14]
    assert torch.equal(pooled.amax(dim=(1, 2, 3)), pooled.amin(dim=(1, 2, 3)))
    pooled.sum().backward()
    assert [m.grad.sum().item() for m in maps] == pytest.approx([18, 9, 18], rel=1e-5)


def test_pooling_no_boxes_keeps_the_graph():
    maps = [torch.rand(2, 3, 64 // s, 64 // s, requires_grad=True) for s in (4, 8)]
    pooled = ROIPooler(7, (1 / 4, 1 / 8), 0, "ROIAlignV2")(maps, [Boxes([]), Boxes([])])
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert all(m.grad is not None and not m.grad.any() for m in maps)


def test_detections_in_another_size():
    found = Instances((10, 20))
    found.pred_boxes = Boxes([[2, 2, 6, 8], [19, 9, 40, 30], [25, 0, 30, 5]])
    found.pred_masks = torch.ones(3, 1, 28, 28)
    out = detector_postprocess(found, 30, 40)
    assert out.image_size == (30, 40)
    assert out.pred_boxes.tensor.tolist() == [[4, 6, 12, 24], [38, 27, 40, 30]]  # the third is outside
    assert out.pred_masks.shape == (2, 30, 40) and out.pred_masks.sum(dim=(1, 2)).tolist() == [8 * 18, 2 * 3]


def test_scores_of_a_map_lose_their_padding():
    padded = torch.zeros(2, 8, 8)
    padded[:, :4, :6] = torch.tensor([1.0, 2.0])[:, None, None]
    out = sem_seg_postprocess(padded, (4, 6), 8, 12)
    assert out.shape == (2, 8, 12) and out[0].unique().tolist() == [1] and out[1].unique().tolist() == [2]
