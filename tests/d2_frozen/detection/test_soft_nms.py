"""Soft-NMS: closed forms, its limits, and a loop that follows the paper's Figure 2 line by line."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from d2_frozen.detection import SoftNMS, soft_nms
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

# Two boxes of 10 x 10 that share 10 x 6: IoU 60 / 140 = 3/7. The third touches nobody.
BOXES = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 4.0, 10.0, 14.0], [50.0, 50.0, 60.0, 60.0]])
SCORES = torch.tensor([0.8, 0.7, 0.6])
SAME = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"method": "linear", "iou_threshold": 0.3}, 1 - 3 / 7),
        ({"method": "linear", "iou_threshold": 0.5}, 1.0),  # IoU below the threshold
        ({"method": "gaussian", "sigma": 0.5}, math.exp(-((3 / 7) ** 2) / 0.5)),
        ({"method": "gaussian", "sigma": 2.0}, math.exp(-((3 / 7) ** 2) / 2.0)),
    ],
)
def test_two_boxes_of_known_iou(options: dict, factor: float) -> None:
    kept, scores = soft_nms(BOXES, SCORES, SAME, **options)
    expected = {0: 0.8, 1: 0.7 * factor, 2: 0.6}
    assert kept.tolist() == sorted(expected, key=lambda i: -expected[i])
    torch.testing.assert_close(scores, torch.tensor([expected[i] for i in kept.tolist()]))


def test_decay_multiplies() -> None:
    """Three boxes on the same place: (1 - 1) removes both others; gaussian: exp(-1 / sigma), once and twice."""
    boxes = BOXES[:1].repeat(3, 1)
    kept, scores = soft_nms(boxes, SCORES, SAME, method="linear")
    assert kept.tolist() == [0] and scores.tolist() == pytest.approx([0.8])
    kept, scores = soft_nms(boxes, SCORES, SAME, method="gaussian", sigma=1.0)
    assert kept.tolist() == [0, 1, 2]
    assert scores.tolist() == pytest.approx([0.8, 0.7 / math.e, 0.6 / math.e**2], rel=1e-5)


def test_classes_do_not_meet() -> None:
    kept, scores = soft_nms(BOXES, SCORES, torch.tensor([4, 1, 4]), method="linear", iou_threshold=0.1)
    assert kept.tolist() == [0, 1, 2] and torch.equal(scores, SCORES)


def test_minimum_score_and_topk() -> None:
    kept, _ = soft_nms(BOXES, SCORES, SAME, method="linear", iou_threshold=0.3, min_score=0.5)
    assert kept.tolist() == [0, 2]
    kept, _ = soft_nms(BOXES, SCORES, SAME, method="gaussian", topk=2)
    assert kept.tolist() == [0, 2]


def test_nothing_in_nothing_out() -> None:
    kept, scores = soft_nms(BOXES[:0], SCORES[:0], SAME[:0], method="linear")
    assert kept.shape == scores.shape == (0,)


def figure_2(
    boxes: Tensor, scores: Tensor, decay: Callable[[Tensor], Tensor], min_score: float
) -> dict[int, float]:
    left, result = dict(enumerate(scores.tolist())), {}
    overlaps = box_iou(boxes, boxes)
    while left:
        best = max(left, key=lambda i: left[i])
        result[best] = left.pop(best)
        left = {i: s * float(decay(overlaps[best, i])) for i, s in left.items()}
    return {i: s for i, s in result.items() if s >= min_score}


def crowd(count: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(count)
    corners = torch.rand(count, 2, generator=draws) * 40
    boxes = torch.cat([corners, corners + 5 + 20 * torch.rand(count, 2, generator=draws)], dim=1)
    return boxes, torch.rand(count, generator=draws), torch.randint(0, classes, (count,), generator=draws)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_equals_the_papers_loop(method: str) -> None:
    boxes, scores, classes = crowd(90, 4)
    decays: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": lambda iou: torch.where(iou >= 0.3, 1 - iou, 1.0),
        "gaussian": lambda iou: torch.exp(-(iou**2) / 0.5),
    }
    expected: dict[int, float] = {}
    for one in range(4):
        rows = (classes == one).nonzero().squeeze(1)
        found = figure_2(boxes[rows], scores[rows], decays[method], min_score=0.05)
        expected |= {int(rows[i]): score for i, score in found.items()}
    options = {"method": method, "iou_threshold": 0.3, "sigma": 0.5, "min_score": 0.05}
    kept, new = soft_nms(boxes, scores, classes, **options)
    assert len(kept) == len(expected)
    assert dict(zip(kept.tolist(), new.tolist())) == pytest.approx(expected, rel=1e-4)
    assert (new[:-1] >= new[1:]).all()
    # Stopping after topk rounds loses nothing.
    few, few_scores = soft_nms(boxes, scores, classes, topk=10, **options)
    assert torch.equal(few, kept[:10]) and torch.equal(few_scores, new[:10])


def test_a_narrow_gaussian_is_hard_nms() -> None:
    """sigma to 0: any overlap ends a box, as NMS at IoU 0. Linear above IoU 1: nothing happens."""
    boxes, scores, classes = crowd(200, 3)
    kept, new = soft_nms(boxes, scores, classes, method="gaussian", sigma=1e-12)
    assert torch.equal(kept, batched_nms(boxes, scores, classes, 0.0))
    assert torch.equal(new, scores[kept])
    kept, new = soft_nms(boxes, scores, classes, method="linear", iou_threshold=1.01, min_score=0.0)
    assert torch.equal(new, scores.sort(descending=True).values)


def test_thousands_of_candidates() -> None:
    """Eighty classes and 8000 boxes: the best 100, and what is left of them does not depend on the order."""
    boxes, scores, classes = crowd(8000, 80)
    kept, new = soft_nms(boxes, scores, classes, method="gaussian", topk=100)
    order = torch.randperm(8000, generator=torch.Generator().manual_seed(0))
    again, new_again = soft_nms(boxes[order], scores[order], classes[order], method="gaussian", topk=100)
    assert torch.equal(order[again], kept) and torch.equal(new, new_again)


def test_detections_keep_their_fields() -> None:
    found = Instances(
        (100, 100), pred_boxes=Boxes(BOXES), scores=SCORES, pred_classes=SAME, extra=torch.arange(3)
    )
    result = SoftNMS("linear", iou_threshold=0.3)(found)
    assert result.extra.tolist() == [0, 2, 1] and result.image_size == (100, 100)
    assert torch.equal(found.scores, SCORES)


HEADS = ["StandardROIHeads", "CascadeROIHeads", "HTCROIHeads"]


def detector(small_config: Callable[..., CfgNode], heads: str, *options: object) -> nn.Module:
    cascade = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", heads != "StandardROIHeads")
    torch.manual_seed(0)
    name = ("MODEL.ROI_HEADS.NAME", heads, "MODEL.RPN.NMS_THRESH", 0.95)
    return build_model(small_config(*name, *cascade, *options)).eval()


@pytest.mark.parametrize("heads", HEADS)
def test_every_kind_of_heads_ends_with_it(
    small_config: Callable[..., CfgNode], labelled_image: Callable[[], dict], heads: str
) -> None:
    plain = detector(small_config, heads, "MODEL.ROI_HEADS.NMS_THRESH_TEST", 2.0)
    soft = detector(small_config, heads, "MODEL.ROI_HEADS.NMS_TYPE", "soft_nms_gaussian")
    assert plain.state_dict().keys() == soft.state_dict().keys()
    with torch.no_grad():
        everything = plain([labelled_image()])[0]["instances"]
        found = soft([labelled_image()])[0]["instances"]
        soft.roi_heads.soft_nms_on = False
        raw = soft([labelled_image()])[0]["instances"]
    assert torch.equal(raw.scores, everything.scores)
    expected = SoftNMS("gaussian", sigma=0.5, topk=100)(everything)
    torch.testing.assert_close(found.scores, expected.scores)
    assert (found.scores < everything.scores[: len(found)]).any()
    torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert found.pred_masks.shape == (len(found), 64, 96)


def test_wrong_settings(small_config: Callable[..., CfgNode]) -> None:
    with pytest.raises(ValueError, match=r"NMS_TYPE is 'soft'; choose one of nms, soft_nms_linear"):
        detector(small_config, "StandardROIHeads", "MODEL.ROI_HEADS.NMS_TYPE", "soft")
    gaussian = ("MODEL.ROI_HEADS.NMS_TYPE", "soft_nms_gaussian")
    with pytest.raises(ValueError, match=r"SOFT_NMS_SIGMA is 0.0"):
        detector(small_config, "StandardROIHeads", *gaussian, "MODEL.ROI_HEADS.SOFT_NMS_SIGMA", 0.0)
    with pytest.raises(ValueError, match=r"soft_nms_gaussian, which MODEL.ROI_HEADS.NAME Res5ROIHeads"):
        detector(small_config, "Res5ROIHeads", *gaussian)
    with pytest.raises(ValueError, match="choose linear or gaussian"):
        soft_nms(BOXES, SCORES, SAME, method="hard")
