"""Where the embedded engine's structures and layers are stricter or more exact on purpose."""

from __future__ import annotations

import copy

import pytest
import torch

import detectron2

if not hasattr(detectron2, "EMBEDDED_IN"):
    pytest.skip("the installed Detectron2 is the engine", allow_module_level=True)

from detectron2.layers import DeformConv, ModulatedDeformConv, ROIAlign, paste_masks_in_image
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances


def test_an_image_that_does_not_fit_its_square_is_refused():
    with pytest.raises(ValueError, match="50x60 pixels does not fit the 40x40"):
        ImageList.from_tensors([torch.zeros(3, 50, 60)], padding_constraints={"square_size": 40})


def test_masks_of_boxes_outside_of_the_image_are_empty():
    boxes = torch.tensor([[50.0, 50, 60, 60], [-30.0, -30, -20, -20], [5.0, 5, 5, 5], [8.0, 8, 3, 3]])
    pasted = paste_masks_in_image(torch.ones(4, 28, 28), boxes, (20, 30))
    assert pasted.shape == (4, 20, 30) and not pasted[:3].any()


def test_pooling_half_floats_does_not_move_the_box():
    """603 pixels need 10 bits; bfloat16 has 8 and would make it 604."""
    ramp = (torch.arange(640.0) + 0.5).expand(1, 1, 16, 640) / 640
    roi = torch.tensor([[0.0, 603.0, 2.0, 611.0, 10.0]])
    exact = ROIAlign((2, 2), 1.0, 2)(ramp, roi)
    half = ROIAlign((2, 2), 1.0, 2)(ramp.half(), roi)
    assert half.dtype == torch.float16
    assert torch.allclose(half.float(), exact, atol=1e-3)
    rounded = ROIAlign((2, 2), 1.0, 2)(ramp, roi.bfloat16().float())
    assert not torch.allclose(rounded, exact, atol=1e-3)


def test_postprocessing_leaves_its_input_alone():
    found = Instances((10, 20), pred_boxes=Boxes([[2, 2, 6, 8]]))
    before = copy.deepcopy(found.pred_boxes.tensor)
    detector_postprocess(found, 30, 40)
    assert torch.equal(found.pred_boxes.tensor, before)


def test_deformable_convolution_without_offsets_is_a_convolution():
    x = torch.randn(2, 4, 6, 7)
    plain = DeformConv(4, 6, 3, padding=1, groups=2, deformable_groups=2)
    offset = torch.zeros(2, 2 * 2 * 9, 6, 7)
    wanted = torch.nn.functional.conv2d(x, plain.weight, padding=1, groups=2)
    assert torch.allclose(plain(x, offset), wanted, atol=1e-5)
    weighted = ModulatedDeformConv(4, 6, 3, padding=1)
    half = weighted(x, offset[:, :18], torch.full((2, 9, 6, 7), 0.5))
    assert torch.allclose(half, 0.5 * torch.nn.functional.conv2d(x, weighted.weight, padding=1), atol=1e-5)
