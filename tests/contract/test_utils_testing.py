"""Helpers for tests: random boxes, and detections that agree up to rounding."""

from __future__ import annotations

import pytest
import torch

from detectron2.structures import Boxes, Instances
from detectron2.utils.torch_version_utils import min_torch_version

# Some builds of Detectron2 cannot import it, for want of pkg_resources.
testing = pytest.importorskip("detectron2.utils.testing")


def test_random_boxes_are_a_corner_and_sides_in_the_order_of_the_generator():
    torch.manual_seed(3)
    boxes = testing.random_boxes(50, max_coord=8)
    torch.manual_seed(3)
    drawn = (torch.rand(50, 4) * 4).clamp(min=1)
    assert torch.allclose(boxes[:, :2], drawn[:, :2])
    assert torch.allclose(boxes[:, 2:] - boxes[:, :2], drawn[:, 2:], atol=1e-6)


def _detections(**changed) -> Instances:
    fields = {"scores": torch.tensor([0.5, 1000.0]), "pred_classes": torch.tensor([3, 4])}
    fields["pred_boxes"] = Boxes([[0, 0, 10, 10], [5, 5, 9, 9]])
    return Instances((20, 30), **{**fields, **changed})


def test_instances_are_close_relative_to_the_largest_value_of_a_field():
    same = _detections(scores=torch.tensor([0.509, 1000.0]))
    testing.assert_instances_allclose(_detections(), same, rtol=1e-5)
    with pytest.raises(AssertionError, match="scores"):
        testing.assert_instances_allclose(_detections(), same, rtol=5e-6)


@pytest.mark.parametrize(
    "changed",
    [
        {"pred_classes": torch.tensor([3, 5])},
        {"pred_boxes": Boxes([[0, 0, 10, 10], [5, 5, 9, 8]])},
        {"more": torch.zeros(2)},
    ],
)
def test_instances_that_differ_are_told_apart(changed):
    with pytest.raises(AssertionError):
        testing.assert_instances_allclose(_detections(), _detections(**changed))


def test_image_sizes_are_compared():
    other = Instances((20, 31), **_detections().get_fields())
    with pytest.raises(AssertionError):
        testing.assert_instances_allclose(_detections(), other)


def test_a_scripted_module_survives_saving():
    scripted = torch.jit.script(torch.nn.Linear(2, 1))
    x = torch.randn(3, 2)
    assert torch.equal(testing.reload_script_model(scripted)(x), scripted(x))


def test_versions_compare_by_number():
    """2.10 is newer than 2.9."""
    assert min_torch_version("1.8") and min_torch_version("1.13.1")
    assert min_torch_version(torch.__version__.split("+")[0])
    assert not min_torch_version("1000.0")
