"""Parts of detectors in TorchScript: the scripted part answers what the eager one does, and can be saved.

Only parts without ``Instances``: those need Detectron2's export module.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from detectron2.config import get_cfg
from detectron2.layers import batched_nms, nonzero_tuple  # noqa: F401 (the matcher's name for TorchScript)
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, ImageList, pairwise_iou

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")


def _through_a_file(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


def _random_boxes(count: int, side: float = 60) -> Tensor:
    corners = torch.rand(count, 4) * side / 2
    return torch.cat((corners[:, :2], corners[:, :2] + corners[:, 2:] + 1), dim=1)


def _use_boxes(coords: Tensor, others: Tensor):
    boxes = Boxes(coords).to(torch.device("cpu"))
    boxes.clip((20, 30))
    boxes = boxes[boxes.nonempty(threshold=2.0)]
    boxes.scale(0.5, 2.0)
    overlaps = pairwise_iou(boxes.clone(), Boxes(others))
    return boxes.cat([boxes, Boxes(others)]).tensor, boxes.area(), boxes.get_centers(), overlaps, len(boxes)


def test_boxes():
    coords, others = _random_boxes(9), _random_boxes(4)
    *tensors, count = _through_a_file(torch.jit.script(_use_boxes))(coords.clone(), others)
    *wanted, wanted_count = _use_boxes(coords.clone(), others)
    assert count == wanted_count > 0
    assert all(torch.equal(a, b) for a, b in zip(tensors, wanted, strict=True))


def _to_batch(first: Tensor, second: Tensor):
    batch = ImageList.from_tensors([first, second], 4, 0.5)
    return batch.tensor, batch.image_sizes


@pytest.mark.parametrize("size", [(3, 9, 12), (3, 8, 8)])
def test_image_list(size: tuple[int, int, int]):
    first, second = torch.rand(3, 8, 8), torch.rand(size)
    batch, sizes = torch.jit.script(_to_batch)(first, second)
    assert torch.equal(batch, _to_batch(first, second)[0])
    assert sizes == [(8, 8), size[1:]]


def test_image_list_in_a_trace_takes_other_sizes():
    """8x8 needs no padding, which must not become part of the trace."""
    traced = torch.jit.trace(_to_batch, (torch.rand(3, 8, 8), torch.rand(3, 8, 8)))
    first, second = torch.rand(3, 5, 13), torch.rand(3, 11, 2)
    batch, sizes = traced(first, second)
    assert torch.equal(batch, _to_batch(first, second)[0]) and batch.shape == (2, 3, 12, 16)
    assert [size.tolist() for size in sizes] == [[5, 13], [11, 2]]


def test_matcher_made_in_a_script():
    def make(thresholds: list[float], labels: list[int]):
        return Matcher(thresholds, labels, allow_low_quality_matches=True)

    quality = torch.tensor([[0.9, 0.2, 0.4, 0.1], [0.0, 0.1, 0.3, 0.6]])
    rpn = get_cfg().MODEL.RPN
    matches, labels = torch.jit.script(make)(rpn.IOU_THRESHOLDS, rpn.IOU_LABELS)(quality)
    assert matches.tolist() == [0, 0, 0, 1] and labels.tolist() == [1, 0, -1, 1]


def test_nms_within_groups():
    boxes, scores, groups = _random_boxes(80), torch.rand(80), torch.randint(0, 3, (80,))
    scripted = torch.jit.script(batched_nms)
    assert torch.equal(scripted(boxes, scores, groups, 0.3), batched_nms(boxes, scores, groups, 0.3))
