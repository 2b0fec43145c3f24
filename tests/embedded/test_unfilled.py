"""Leaving start values out changes neither what is drawn next nor the model that a seed gives."""

import pytest
import torch
from torch import nn

from detectron2.layers import ShapeSpec
from detectron2.modeling._unfilled import pass_over_draws, unfilled_linear
from detectron2.modeling.roi_heads import FastRCNNConvFCHead


@pytest.mark.parametrize("count", [1, 15, 16, 65536, 65537, 200000])
def test_the_generator_goes_on_as_after_uniform_draws(count):
    torch.manual_seed(3)
    torch.empty(count).uniform_()
    expected = torch.rand(4)
    torch.manual_seed(3)
    pass_over_draws(count)
    assert torch.equal(torch.rand(4), expected)


def test_a_seed_gives_the_head_that_it_gives_with_ordinary_layers(monkeypatch):
    heads = []
    for make in (unfilled_linear, nn.Linear):
        monkeypatch.setattr("detectron2.modeling.roi_heads.box_head.unfilled_linear", make)
        torch.manual_seed(0)
        heads.append(
            FastRCNNConvFCHead(ShapeSpec(channels=3, height=7, width=7), conv_dims=[4], fc_dims=[8, 6])
        )
    for ours, usual in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        assert torch.equal(ours, usual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_type_and_device_are_those_of_an_ordinary_layer(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = unfilled_linear(3, 2)
    finally:
        torch.set_default_dtype(before)
    assert layer.weight.dtype == dtype and layer.weight.shape == (2, 3) and layer.weight.requires_grad
    with torch.device("meta"):
        assert unfilled_linear(3, 2).weight.is_meta
