"""ROIAlign as a sparse product gives torchvision's numbers and gradients, for every kind of box."""

import pytest
import torch
import torchvision.ops

import detectron2.layers._roi_align_cpu as sparse
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

# Inside; larger than the map; partly and wholly outside; without area; one cell; elongated, both ways.
_BOXES = [
    [3.0, 5.0, 20.0, 17.0],
    [-50.0, -60.0, 150.0, 140.0],
    [50.0, 40.0, 75.0, 90.0],
    [-40.0, -30.0, -20.0, -10.0],
    [8.0, 8.0, 8.0, 8.0],
    [12.0, 16.0, 16.0, 20.0],
    [0.0, 30.0, 64.0, 33.0],
    [31.0, 0.0, 33.5, 48.0],
]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 4])
@pytest.mark.parametrize("size", [(7, 7), (2, 5)])
def test_equals_torchvision(aligned, sampling_ratio, size):
    torch.manual_seed(0)
    rois = torch.tensor([[i % 2, *box] for i, box in enumerate(_BOXES)], dtype=torch.float64)
    maps = torch.randn(2, 3, 12, 16, dtype=torch.float64)
    weight = torch.randn(len(rois), 3, *size, dtype=torch.float64)
    level = torch.zeros(len(rois), dtype=torch.long)
    found = []
    for pool in (
        lambda x: torchvision.ops.roi_align(x, rois, size, 0.25, sampling_ratio, aligned),
        lambda x: sparse.roi_align_pyramid([x], rois, level, size, [0.25], sampling_ratio, aligned),
    ):
        x = maps.clone().requires_grad_()
        pooled = pool(x)
        (pooled * weight).sum().backward()
        found.append((pooled.detach(), x.grad))
    for expected, actual in zip(*found):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_a_pyramid_at_once_equals_level_by_level(monkeypatch):
    torch.manual_seed(0)
    maps = [torch.randn(2, 4, 64 // s, 96 // s, requires_grad=True) for s in (1, 2, 4)]
    corner = torch.rand(2, 90, 2) * 200
    boxes = [Boxes(torch.cat((c, c + torch.rand(90, 2) * 300), dim=1)) for c in corner]
    pooler = ROIPooler(7, [1 / 4, 1 / 8, 1 / 16], 0, "ROIAlignV2", canonical_box_size=112, canonical_level=3)
    found = []
    for at_once in (True, False):
        monkeypatch.setattr(sparse, "pays", lambda *_, answer=at_once: answer)
        pooled = pooler(maps, boxes)
        found.append([pooled, *torch.autograd.grad(pooled.square().sum(), maps)])
    for expected, actual in zip(*found):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_level_without_boxes_still_has_a_gradient():
    maps = [torch.randn(1, 32, 8, 8, requires_grad=True), torch.randn(1, 32, 4, 4, requires_grad=True)]
    pooler = ROIPooler(2, [1 / 4, 1 / 8], 2, "ROIAlignV2", canonical_box_size=16, canonical_level=3)
    pooler(maps, [Boxes(torch.tensor([[2.0, 2.0, 6.0, 6.0]]))]).sum().backward()
    assert maps[0].grad.sum().item() == pytest.approx(32 * 4)  # weights of each output cell add up to 1
    assert torch.equal(maps[1].grad, torch.zeros_like(maps[1]))


def test_few_boxes_on_large_maps_and_accelerators_go_to_torchvision():
    rois = torch.zeros(3, 5)
    assert not sparse.pays([torch.zeros(1, 32, 100, 100)], rois, (7, 7))
    assert not sparse.pays([torch.zeros(1, 32, 8, 8, device="meta")], rois, (7, 7))
    assert not sparse.pays([torch.zeros(0, 32, 8, 8)], rois, (7, 7))
    assert not sparse.pays([torch.zeros(1, 16, 8, 8)], rois, (7, 7))
    assert sparse.pays([torch.zeros(1, 32, 8, 8)], rois, (7, 7))


@pytest.mark.parametrize("size", [3, (3, 3)])
def test_layer_takes_one_size_or_two(size):
    pooled = ROIAlign(size, 0.25, 2)(torch.ones(1, 2, 8, 8), torch.tensor([[0.0, 4.0, 4.0, 16.0, 16.0]]))
    torch.testing.assert_close(pooled, torch.ones(1, 2, 3, 3))


def test_scripts_without_it():
    pooler = torch.jit.script(ROIPooler(2, [1 / 4, 1 / 8], 2, "ROIAlignV2"))
    assert "_all_levels_at_once" not in pooler.code


def test_half_precision_is_computed_in_float32():
    torch.manual_seed(0)
    maps = torch.randn(1, 3, 16, 16, dtype=torch.bfloat16)
    rois = torch.tensor([[0.0, 1.0, 2.0, 41.3, 30.7]])
    level = torch.zeros(1, dtype=torch.long)
    pooled = sparse.roi_align_pyramid([maps], rois, level, (7, 7), [0.25], 0, True)
    exact = torchvision.ops.roi_align(maps.float(), rois, 7, 0.25, 0, True)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled, exact.to(torch.bfloat16))
