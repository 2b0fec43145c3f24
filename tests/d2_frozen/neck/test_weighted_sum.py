"""Weighted sums: the numbers and gradients of the plain sum."""

import pytest
import torch

from d2_frozen.neck.cpu_layout import channels_last_on_cpu
from d2_frozen.neck.weighted_sum import _sum_in_place, weighted_sum


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


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu_as_on_a_cpu(count, dtype):
    """Also inside autocast, where addcmul alone would give float32."""
    shares = torch.rand(count, requires_grad=True)
    maps = [torch.randn(2, 3, 4, 5, dtype=dtype, requires_grad=True) for _ in range(count)]
    grad = torch.randn(2, 3, 4, 5, dtype=dtype)
    wanted = plain_sum(shares, maps)
    wanted = [wanted, *torch.autograd.grad(wanted, [shares, *maps], grad)]
    there = [one.detach().cuda().requires_grad_() for one in (shares, *maps)]
    with torch.autocast("cuda", dtype=torch.float16):
        got = weighted_sum(there[0], there[1:])
    got = [got, *torch.autograd.grad(got, there, grad.cuda())]
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.cpu(), other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_may_be_tensors(dtype):
    """As on a GPU."""
    factors, maps = torch.rand(3), torch.randn(3, 2, 4, 5, 6).to(dtype)
    total = _sum_in_place(factors.unbind(), maps.unbind())
    assert total.dtype == dtype
    torch.testing.assert_close(total, _sum_in_place(factors.tolist(), maps.unbind()), rtol=2e-2, atol=2e-2)


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
