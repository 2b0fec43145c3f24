"""Layers against closed forms: norms, convolutions, pasting, losses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detectron2.layers import (
    ASPP,
    CNNBlockBase,
    Conv2d,
    CycleBatchNormList,
    DeformConv,
    DepthwiseSeparableConv2d,
    FrozenBatchNorm2d,
    ModulatedDeformConv,
    NaiveSyncBatchNorm,
    ROIAlign,
    batched_nms,
    ciou_loss,
    cross_entropy,
    diou_loss,
    get_norm,
    paste_masks_in_image,
)
from detectron2.layers.mask_ops import _do_paste_mask, paste_mask_in_image_old


def batch_norm_with_statistics(channels: int = 3) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 2.0)
    return norm


@pytest.mark.parametrize("needs_grad", [False, True])
def test_frozen_batch_norm_is_batch_norm_in_eval(needs_grad: bool):
    """Both of its ways, with and without gradient of the input."""
    norm = batch_norm_with_statistics()
    frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(norm)
    x = torch.randn(2, 3, 4, 5, requires_grad=needs_grad)
    assert torch.allclose(frozen(x), norm(x), atol=1e-6)
    assert frozen(x).requires_grad == needs_grad and not list(frozen.parameters())
    assert torch.allclose(
        FrozenBatchNorm2d.convert_frozenbatchnorm2d_to_batchnorm2d(frozen).eval()(x), norm(x), atol=1e-6
    )


def test_early_checkpoints_have_no_statistics():
    frozen = FrozenBatchNorm2d(2)
    state = {"weight": torch.tensor([2.0, 3.0]), "bias": torch.tensor([1.0, 1.0])}  # no version: the earliest
    result = frozen.load_state_dict(state, strict=False)
    assert not result.missing_keys
    assert frozen.running_mean.tolist() == [0, 0] and frozen.running_var.tolist() == [1, 1]


def test_freezing_a_block():
    block = CNNBlockBase(3, 3, 1)
    block.conv = Conv2d(3, 3, 1, norm=nn.BatchNorm2d(3))
    names = list(block.state_dict())
    assert block.freeze() is block
    assert isinstance(block.conv.norm, FrozenBatchNorm2d) and list(block.state_dict()) == names
    assert not any(p.requires_grad for p in block.parameters())


def test_layer_norm_of_maps_is_layer_norm_with_channels_last():
    norm = get_norm("LN", 6)
    norm.weight.data.uniform_()
    x = torch.randn(2, 6, 3, 4)
    last = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (6,), norm.weight, norm.bias, eps=1e-6)
    assert torch.allclose(norm(x), last.permute(0, 3, 1, 2), atol=1e-6)


def test_naive_sync_batch_norm_of_one_worker_is_batch_norm():
    x = torch.randn(4, 3, 5, 5)
    naive, plain = NaiveSyncBatchNorm(3, stats_mode="N"), nn.BatchNorm2d(3)
    assert torch.equal(naive(x), plain(x))
    assert torch.equal(naive.running_var, plain.running_var)


def test_cycling_batch_norms_take_turns():
    norms = CycleBatchNormList(2, num_features=3)
    low, high = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8) + 10
    for x in (low, high):
        norms(x)
    assert norms[0].running_mean.abs().max() < 0.1 and norms[1].running_mean.min() > 0.5  # momentum 0.1
    assert [name for name, _ in norms.named_parameters()] == ["weight", "bias"]


def test_conv_then_norm_then_activation():
    conv = Conv2d(2, 3, 3, padding=1, norm=batch_norm_with_statistics(), activation=torch.relu).eval()
    x = torch.randn(1, 2, 5, 5)
    plain = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    assert torch.equal(conv(x), torch.relu(conv.norm(plain)))


def test_depthwise_separable_shapes_and_names():
    conv = DepthwiseSeparableConv2d(4, 6, norm1="", norm2="BN")
    assert {k: tuple(v.shape) for k, v in conv.named_parameters()} == {
        "depthwise.weight": (4, 1, 3, 3),
        "depthwise.bias": (4,),
        "pointwise.weight": (6, 4, 1, 1),
        "pointwise.norm.weight": (6,),
        "pointwise.norm.bias": (6,),
    }
    assert conv(torch.rand(2, 4, 5, 7)).shape == (2, 6, 5, 7)


def test_aspp_keeps_the_size():
    for separable in (False, True):
        aspp = ASPP(
            4, 6, [1, 2, 3], norm="", activation=nn.ReLU(), use_depthwise_separable_conv=separable
        ).eval()
        assert aspp(torch.rand(1, 4, 8, 9)).shape == (1, 6, 8, 9)
    with pytest.raises(ValueError):
        ASPP(4, 6, [1, 2, 3], norm="", activation=nn.ReLU(), pool_kernel_size=(4, 4))(torch.rand(1, 4, 8, 9))


def test_loss_of_nothing_is_zero_and_reaches_the_input():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, 5)


def test_distance_iou_of_squares_side_by_side():
    """Unit squares side by side: IoU 0, centres 1 apart, enclosing box 2x1: 1 + 1/5, CIoU the same."""
    a, b = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[1.0, 0.0, 2.0, 1.0]])
    for loss in (diou_loss, ciou_loss):
        assert torch.allclose(loss(a, b), torch.tensor([1.2]))
        assert loss(a, a, reduction="sum").item() == pytest.approx(0, abs=1e-6)
        assert loss(a[:0], b[:0], reduction="mean").item() == 0
    wide = torch.tensor([[-0.5, 0.25, 1.5, 0.75]])  # same centre, other shape
    assert ciou_loss(a, wide) > diou_loss(a, wide)


def test_nms_stays_within_its_group():
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 3)
    keep = batched_nms(boxes, torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0, 0, 1]), 0.5)
    assert keep.tolist() == [1, 2]


def test_roi_align_of_a_ramp_gives_cell_centres():
    """On f(x) = x the average of a cell is its centre: aligned counts cells from their left side."""
    ramp = (torch.arange(16.0) + 0.5).expand(1, 1, 16, 16)
    roi = torch.tensor([[0.0, 2.0, 2.0, 10.0, 10.0]])
    aligned = ROIAlign((4, 4), 1.0, 0)(ramp, roi)[0, 0, 0]
    assert torch.allclose(aligned, torch.tensor([3.0, 5.0, 7.0, 9.0]))
    legacy = ROIAlign((4, 4), 1.0, 0, aligned=False)(ramp, roi)[0, 0, 0]
    assert torch.allclose(legacy, aligned + 0.5)


def test_both_ways_to_paste_agree():
    """Around its box (as on a CPU) or in the whole image at once (as on a GPU)."""
    masks = torch.rand(4, 1, 28, 28)
    boxes = torch.tensor(
        [[3.0, 4.0, 20.0, 17.5], [-8.0, 2.0, 9.0, 40.0], [10.5, 10.5, 11.5, 30.0], [0.0, 0.0, 40.0, 30.0]]
    )
    whole, _ = _do_paste_mask(masks, boxes, 30, 40, skip_empty=False)
    for mask, box, expected in zip(masks, boxes, whole):
        part, region = _do_paste_mask(mask[None], box[None], 30, 40, skip_empty=True)
        around = torch.zeros(30, 40)
        around[region] = part[0]
        assert torch.equal(around, expected)
        assert torch.equal(paste_masks_in_image(mask, box[None], (30, 40))[0], expected >= 0.5)


def test_the_old_way_to_paste_has_one_pixel_more():
    """A box from 1.9 to 4.9 is pixels 1, 2, 3 and 4; what lies outside of the image is cut off."""
    mask, box = torch.full((3, 3), 0.6), torch.tensor([1.9, -2.9, 4.9, 1.0])
    old = paste_mask_in_image_old(mask, box, 5, 6, 0.5)
    assert old.dtype == torch.uint8 and old.nonzero().tolist() == [
        [y, x] for y in (0, 1) for x in (1, 2, 3, 4)
    ]
    assert paste_mask_in_image_old(mask, box, 5, 6, -1).unique().tolist() == [0, 153]  # 0.6 * 255
    assert not paste_mask_in_image_old(mask, box, 5, 6, 0.7).any()


def test_deformable_convolutions_say_how_they_were_made():
    """The plain one has pairs, the modulated one what it was given."""
    sizes = {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "padding": 1}
    plain, modulated = DeformConv(**sizes, deformable_groups=2), ModulatedDeformConv(**sizes, bias=False)
    assert "kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1" in repr(plain)
    assert "deformable_groups=2, bias=False" in repr(plain)
    assert "kernel_size=(3, 3), stride=1, padding=1, dilation=1, groups=1" in repr(modulated)
