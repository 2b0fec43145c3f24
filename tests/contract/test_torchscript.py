"""Parts of detectors in TorchScript: the scripted part answers what the eager one does, and can be saved.

Only parts without ``Instances``: those need Detectron2's export module.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

import detectron2.export.torchscript  # noqa: F401 (the original scripts ResNet and FPN only then)
from detectron2.config import get_cfg
from detectron2.layers import (
    Conv2d,
    FrozenBatchNorm2d,
    ROIAlign,
    ShapeSpec,
    batched_nms,
    nonzero_tuple,  # noqa: F401 (the original's Matcher needs it where it is scripted)
    paste_masks_in_image,
)
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
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


def test_convolution_with_norm_and_activation():
    conv = Conv2d(2, 3, 3, norm=FrozenBatchNorm2d(3), activation=torch.nn.ReLU())
    x = torch.randn(1, 2, 7, 6)
    assert torch.equal(_through_a_file(torch.jit.script(conv))(x), conv(x))


def test_pasting_masks():
    masks, boxes = torch.rand(6, 9, 9), _random_boxes(6)
    scripted = torch.jit.script(paste_masks_in_image)
    assert torch.equal(scripted(masks, boxes, (50, 40), 0.5), paste_masks_in_image(masks, boxes, (50, 40)))
    assert scripted(masks, boxes, (50, 40), -1.0).dtype == torch.uint8


def test_anchors():
    anchors = DefaultAnchorGenerator(sizes=[[8.0, 16.0]], aspect_ratios=[[0.5, 1.0]], strides=[4, 8])
    maps = [torch.zeros(2, 1, 5, 3), torch.zeros(2, 1, 3, 2)]
    found = torch.jit.script(anchors)(maps)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(found, anchors(maps), strict=True))


def test_box_deltas():
    class Deltas(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.transform = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            return self.transform.apply_deltas(self.transform.get_deltas(source, target), source)

    source, target = _random_boxes(5), _random_boxes(5)
    assert torch.allclose(torch.jit.script(Deltas())(source, target), target, atol=1e-4)


def test_roi_align():
    pool = ROIAlign((3, 2), 0.25, 2)
    rois = torch.cat((torch.zeros(4, 1), _random_boxes(4)), dim=1)
    features = torch.randn(1, 2, 16, 16)
    scripted = _through_a_file(torch.jit.script(pool))
    assert torch.allclose(scripted(features, rois), pool(features, rois), atol=1e-5)


@pytest.fixture
def pooler_and_input():
    pooler = ROIPooler(3, (0.25, 0.125), 2, "ROIAlignV2", canonical_box_size=20, canonical_level=3)
    return pooler, [torch.randn(2, 3, 16, 16), torch.randn(2, 3, 8, 8)]


def test_pooler(pooler_and_input):
    pooler, maps = pooler_and_input
    boxes = [Boxes(_random_boxes(6)), Boxes(_random_boxes(3))]
    pooled = torch.jit.script(pooler)(maps, boxes)
    assert pooled.shape == (9, 3, 3, 3)
    assert torch.allclose(pooled, pooler(maps, boxes), atol=1e-5)


def test_pooler_in_a_trace_takes_another_number_of_boxes(pooler_and_input):
    pooler, maps = pooler_and_input

    class PoolBoth(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pooler = pooler

        def forward(self, fine: Tensor, coarse: Tensor, first: Tensor, second: Tensor) -> Tensor:
            return self.pooler([fine, coarse], [Boxes(first), Boxes(second)])

    module = PoolBoth()
    traced = torch.jit.trace(module, (*maps, _random_boxes(6), _random_boxes(2)))
    others = (*maps, _random_boxes(1), _random_boxes(7))
    assert torch.allclose(traced(*others), module(*others), atol=1e-5)


def test_proposals_in_a_trace_take_other_sizes():
    """Another number of anchors, below and above the limit, and another image size."""

    def propose(boxes: Tensor, logits: Tensor, image_size: Tensor):
        found = find_top_rpn_proposals([boxes], [logits], [image_size], 0.7, 12, 5, 0.0, False)[0]
        return found.image_size, found.proposal_boxes.tensor, found.objectness_logits

    def example(anchors: int, side: int):
        boxes = torch.stack([_random_boxes(anchors), _random_boxes(anchors)])
        return boxes, torch.randn(2, anchors), torch.tensor([side, side + 3])

    traced = torch.jit.trace(propose, example(20, 30))
    for anchors, side in ((8, 20), (40, 60)):
        inputs = example(anchors, side)
        for found, wanted in zip(traced(*inputs), propose(*inputs), strict=True):
            assert torch.allclose(found, wanted)


def test_heads_without_instances():
    pooled = ShapeSpec(channels=2, height=4, width=4)
    box_head = FastRCNNConvFCHead(pooled, conv_dims=[3], fc_dims=[6, 5])
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(_through_a_file(torch.jit.script(box_head))(x), box_head(x))

    rpn_head = StandardRPNHead(in_channels=2, num_anchors=3, conv_dims=[4, -1])
    maps = [torch.randn(1, 2, 5, 4), torch.randn(1, 2, 3, 2)]
    for found, wanted in zip(torch.jit.script(rpn_head)(maps), rpn_head(maps), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_resnet_with_fpn():
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64])
    names = ["res2", "res3", "res4", "res5"]
    cfg.merge_from_list(["MODEL.RESNETS.OUT_FEATURES", names, "MODEL.FPN.IN_FEATURES", names])
    cfg.merge_from_list(["MODEL.FPN.OUT_CHANNELS", 8])
    fpn = build_resnet_fpn_backbone(cfg, ShapeSpec(channels=3)).eval()
    before = list(fpn.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for module in (fpn.bottom_up, fpn):
        found, wanted = torch.jit.script(module)(x), module(x)
        assert list(found) == list(wanted)
        assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)
    assert list(fpn.state_dict()) == before
