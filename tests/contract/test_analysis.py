"""Counting what a model costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detectron2.utils.analysis import find_unused_parameters, flop_count_operators, parameter_count


class _Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)
        self.spare = nn.Linear(2, 2)

    def forward(self, batch):
        maps = self.conv(torch.stack([item["image"] for item in batch]))
        if self.training:
            return {"loss": maps.mean()}
        return [{"maps": one} for one in maps]


def test_multiply_adds_of_a_1x1_convolution():
    """2 images x 4 x 6 positions x 3 inputs x 5 outputs."""
    batch = [{"image": torch.rand(3, 4, 6), "height": 8, "width": 12} for _ in range(2)]
    counts = flop_count_operators(_Detector().eval(), batch)
    assert counts["conv"] * 1e9 == pytest.approx(2 * 4 * 6 * 3 * 5)


def test_counting_leaves_the_mode_as_it_was():
    detector = _Detector().train()
    batch = [{"image": torch.rand(3, 4, 6)}]
    assert flop_count_operators(detector, batch)["conv"] * 1e9 == pytest.approx(4 * 6 * 3 * 5)
    assert detector.training


def test_parameters():
    counts = parameter_count(_Detector())
    assert (counts[""], counts["conv"], counts["spare"]) == (26, 20, 6)


def test_unused_parameters_are_named():
    batch = [{"image": torch.rand(3, 4, 6)}]
    assert sorted(find_unused_parameters(_Detector().train(), batch)) == ["spare.bias", "spare.weight"]
