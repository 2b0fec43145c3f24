"""Channels last on a CPU: the numbers and gradients of BiFPN are those of its plain definition."""

import pytest
import torch
from torch import nn

from d2_frozen.neck.bifpn import BiFPNLayer
from d2_frozen.neck.cpu_layout import PointwiseConv2d, channels_last_on_cpu


@pytest.mark.parametrize("bias", [True, False])
def test_pointwise_convolution_in_both_layouts(bias):
    layer = PointwiseConv2d(3, 5, bias=bias)
    reference = nn.Conv2d(3, 5, 1, bias=bias)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 4, 6)
    for laid_out in (x, channels_last_on_cpu(x)):
        torch.testing.assert_close(layer(laid_out), reference(x))
        torch.testing.assert_close(layer(laid_out), reference(x))
    assert layer(channels_last_on_cpu(x)).is_contiguous(memory_format=torch.channels_last)


def test_a_layer_gives_the_same_in_both_layouts():
    """Outputs and gradients of all parameters; maps keep the layout from end to end."""
    layer = BiFPNLayer(8, 3, norm=lambda channels: nn.GroupNorm(2, channels))
    maps = [torch.randn(2, 8, *size) for size in ((9, 10), (5, 5), (3, 3))]
    results = []
    for convert in (lambda x: x, channels_last_on_cpu):
        out = layer([convert(one) for one in maps])
        loss = sum(one.sin().sum() for one in out)  # that of squares is what the norm holds constant
        results.append([*out, *torch.autograd.grad(loss, list(layer.parameters()))])
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in out)
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
