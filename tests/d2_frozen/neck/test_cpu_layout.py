"""Channels last on a CPU: the numbers and gradients of BiFPN are those of its plain definition."""

import pytest
import torch
from torch import nn

from d2_frozen.neck.bifpn import BiFPNLayer
from d2_frozen.neck.cpu_layout import PointwiseConv2d, channels_last_on_cpu, weighted_sum


def plain_sum(shares, maps):
    return sum(share * one for share, one in zip(shares, maps))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weighted_sum_and_its_gradients(count, dtype):
    shares = torch.rand(count, requires_grad=True)
    maps = [channels_last_on_cpu(torch.randn(2, 3, 4, 5, dtype=dtype)).requires_grad_() for _ in range(count)]
    grad = torch.randn(2, 3, 4, 5, dtype=dtype)  # channels first, as a layer behind may send it
    results = []
    for function in (weighted_sum, plain_sum):
        total = function(shares, maps)
        assert total.dtype == dtype
        results.append([total, *torch.autograd.grad(total, [shares, *maps], grad)])
    tolerance = {"rtol": 3e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {}
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, **tolerance)


def test_maps_of_other_layouts_or_mixed_dtypes_are_summed_as_ever():
    shares = torch.tensor([0.25, 0.5])
    one, other = torch.randn(1, 3, 4, 4), channels_last_on_cpu(torch.randn(1, 3, 4, 4))
    assert torch.equal(weighted_sum(shares, [one, other]), 0.25 * one + 0.5 * other)
    half = other.bfloat16()
    assert torch.equal(weighted_sum(shares, [other, half]), 0.25 * other + 0.5 * half)


def test_a_map_without_gradient_gets_none():
    shares = torch.tensor([0.25, 0.5])
    frozen = channels_last_on_cpu(torch.randn(1, 3, 4, 4))
    trained = frozen.clone().requires_grad_()
    weighted_sum(shares, [frozen, trained]).sum().backward()
    assert frozen.grad is None
    assert torch.equal(trained.grad, torch.full_like(trained, 0.5))


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
