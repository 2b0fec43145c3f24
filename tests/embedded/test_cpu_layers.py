"""Layers that compute less, or in another layout, on a CPU: the numbers and gradients are those of torch's layers."""

import pytest
import torch
from torch import nn

from detectron2.layers import Conv2d
from detectron2.layers import _few_gradients as few
from detectron2.layers._box_maps_cpu import BlockDeconvolution, CellPredictor, laid_out
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def gradients(layer, x, of_output):
    """Output, and gradients of the input and all parameters."""
    x = x.detach().requires_grad_()
    out = layer(x)
    return out, *torch.autograd.grad(out, [x, *layer.parameters()], of_output)


def same(layer, reference, x, of_output):
    reference.load_state_dict(layer.state_dict())
    for got, wanted in zip(gradients(layer, x, of_output), gradients(reference, x, of_output), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1), (3, 0), ((1, 3), (0, 1))])
@pytest.mark.parametrize("cells", [[], [(0, 0, 0)], [(1, 5, 7), (0, 3, 0), (1, 0, 2)], None])
def test_gradients_of_few_cells_equal_those_of_a_whole_convolution(cells, kernel, padding, bias, layout):
    """None, one in a corner, some at borders, and all (then computed as ever)."""
    layer = few.ConvOfFewGradients(4, 6, kernel, padding=padding, bias=bias)
    x = torch.randn(2, 4, 9, 10).to(memory_format=layout)
    grad = torch.zeros_like(layer(x))
    if cells is None:
        grad.normal_()
    for image, row, column in cells or []:
        grad[image, :, row, column] = torch.randn(6)
    same(layer, nn.Conv2d(4, 6, kernel, padding=padding, bias=bias), x, grad)


def test_only_cells_with_a_gradient_are_multiplied(monkeypatch):
    """A NaN counts as a gradient; 6 of 50 cells are few, 7 are not (more than an eighth)."""
    seen = []
    whole = few._over_all_cells
    monkeypatch.setattr(few, "_over_all_cells", lambda *a: seen.append("all") or whole(*a))
    layer = few.ConvOfFewGradients(2, 2, 1)
    x = torch.randn(1, 2, 5, 10)
    grad = torch.zeros(1, 2, 5, 10)
    grad[0, 1, 0, :6] = 1.0
    gradients(layer, x, grad)
    assert not seen
    grad[0, 0, 4, 4] = float("nan")
    assert gradients(layer, x, grad)[1].isnan().any()
    assert seen == ["all"]


def test_frozen_parts_get_no_gradient():
    layer = few.ConvOfFewGradients(2, 3, 3, padding=1).requires_grad_(False)
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    layer(x)[0, :, 4, 4].sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None
    assert torch.equal(x.grad.any(dim=1).nonzero()[:, 1:].amin(0), torch.tensor([3, 3]))


def test_few_gradients_under_autocast():
    layer = few.ConvOfFewGradients(4, 6, 3, padding=1)
    reference = nn.Conv2d(4, 6, 3, padding=1)
    reference.load_state_dict(layer.state_dict())
    x, grad = torch.randn(1, 4, 9, 9), torch.zeros(1, 6, 9, 9, dtype=torch.bfloat16)
    grad[0, :, 2, 3] = torch.randn(6).bfloat16()
    results = []
    for one in (layer, reference):
        y = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = one(y)
        assert out.dtype == torch.bfloat16
        results.append([out.float(), *torch.autograd.grad(out, [y, *one.parameters()], grad)])
    assert all(one.dtype == torch.float32 for one in results[0])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


def test_an_rpn_head_sends_the_same_gradients_as_its_dense_layers():
    """Loss at three anchors of one level: all parameters and the map get what plain convolutions would give them."""
    head = StandardRPNHead(in_channels=4, num_anchors=3, conv_dims=[-1, 5])
    plain = [Conv2d(4, 4, 3, padding=1), Conv2d(4, 5, 3, padding=1), nn.Conv2d(5, 3, 1), nn.Conv2d(5, 12, 1)]
    for mine, theirs in zip([*head.conv, head.objectness_logits, head.anchor_deltas], plain, strict=True):
        theirs.load_state_dict(mine.state_dict())
    x = torch.randn(1, 4, 12, 16, requires_grad=True)

    def loss(logits, deltas):
        return logits[0, [0, 2, 1], [0, 5, 11], [0, 7, 15]].sum() + (deltas[0, 4, 5, 7] ** 2)

    [logits], [deltas] = head([x])
    got = torch.autograd.grad(loss(logits, deltas), [x, *head.parameters()])
    hidden = plain[1](plain[0](x).relu()).relu()
    wanted = torch.autograd.grad(
        loss(plain[2](hidden), plain[3](hidden)), [x, *(p for layer in plain for p in layer.parameters())]
    )
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [2, (3, 1)])
def test_deconvolution_into_blocks(block, layout):
    layer = BlockDeconvolution(3, 5, block, stride=block)
    x = torch.randn(2, 3, 4, 6).to(memory_format=layout)
    same(layer, nn.ConvTranspose2d(3, 5, block, stride=block), x, torch.randn_like(layer(x)))


def test_other_deconvolutions_are_torchs():
    layer, reference = (
        kind(3, 5, 3, stride=2, padding=1) for kind in (BlockDeconvolution, nn.ConvTranspose2d)
    )
    x = laid_out(torch.randn(1, 3, 4, 4))
    same(layer, reference, x, torch.randn_like(layer(x)))
    reference.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x, [8, 8]), reference(x, [8, 8]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [1, 4])
def test_predictor_of_cells(classes, layout):
    layer = CellPredictor(3, classes, kernel_size=1)
    x = torch.randn(2, 3, 4, 6).to(memory_format=layout)
    same(layer, nn.Conv2d(3, classes, 1), x, torch.randn_like(layer(x)))


def test_no_boxes():
    for layer in (BlockDeconvolution(3, 5, 2, stride=2), CellPredictor(3, 5, kernel_size=1)):
        assert layer(laid_out(torch.zeros(0, 3, 4, 4))).shape[:2] == (0, 5)
