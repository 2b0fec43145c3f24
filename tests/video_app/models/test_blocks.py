"""Attention in two ways: the fused one, and as products where that is faster to train."""

import pytest
import torch
import torch.nn.functional as F

from video_app.models import blocks


def draw(dtype, *, queries=5, cells=7, trains=True):
    shapes = ((2, 3, queries, 8), (2, 3, cells, 8), (2, 3, cells, 8))
    return [torch.randn(shape).to(dtype).requires_grad_(trains) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_ways_give_the_same_attention_and_gradients(dtype):
    """Against the fused one in float64, to the precision of the dtype."""
    q, k, v = draw(dtype)
    exact = [one.detach().double().requires_grad_() for one in (q, k, v)]
    out, wanted = blocks.attend(q, k, v), F.scaled_dot_product_attention(*exact)
    of_out = torch.randn(out.shape).to(dtype)
    assert out.dtype == dtype
    results = [out, *torch.autograd.grad(out, [q, k, v], of_out)]
    expected = [wanted, *torch.autograd.grad(wanted, exact, of_out.double())]
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for got, right in zip(results, expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "trains", "most", "fused"),
    [
        (torch.bfloat16, True, 2 * 3 * 5 * 7, False),
        (torch.bfloat16, True, 2 * 3 * 5 * 7 - 1, True),  # too many weights to keep
        (torch.bfloat16, False, 1000, True),
        (torch.float32, True, 1000, True),
    ],
)
def test_products_only_where_they_train_faster(monkeypatch, dtype, trains, most, fused):
    used = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: used.append(1) or original(*a))
    monkeypatch.setattr(blocks, "_MOST_WEIGHTS", most)
    blocks.attend(*draw(dtype, trains=trains))
    assert bool(used) == fused


def test_a_block_trains_under_autocast_as_in_float32():
    """Loss and the gradient of the first weights, to bfloat16's precision."""
    block = blocks.VideoBlock(["all"], width=16, heads=2)
    cells = torch.randn(2, 3, 4, 16)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = (block(cells).float() ** 2).mean()
        weight = block.attentions[0].query.weight
        results.append([loss, torch.autograd.grad(loss, weight)[0]])
    (loss, grad), (half_loss, half_grad) = results
    assert torch.allclose(loss, half_loss, rtol=2e-2)
    assert (grad - half_grad).norm() < 0.05 * grad.norm()
