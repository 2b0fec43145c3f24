"""Heads that label each pixel."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from detectron2.layers import ShapeSpec
from seg_app.models import LinearSegHead, UPerNetHead

SHAPES = {
    "res5": ShapeSpec(channels=12, stride=32),
    "res2": ShapeSpec(channels=4, stride=4),
    "res3": ShapeSpec(channels=8, stride=8),
}


def features(h: int = 16, w: int = 24, B: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        name: torch.randn(B, s.channels, -(-4 * h // s.stride), -(-4 * w // s.stride))
        for name, s in SHAPES.items()
    }


def linear(**kwargs) -> LinearSegHead:
    return LinearSegHead(SHAPES, **{"num_classes": 3, "norm": "", **kwargs})


def uper(**kwargs) -> UPerNetHead:
    return UPerNetHead(SHAPES, **{"num_classes": 3, "conv_dims": 8, "norm": "LN", **kwargs})


def test_linear_head_is_one_convolution_on_concatenated_maps() -> None:
    head, maps = linear(), features()
    ordered = [maps[name] for name in ("res2", "res3", "res5")]
    together = torch.cat(
        [F.interpolate(one, size=(16, 24), mode="bilinear", align_corners=False) for one in ordered], dim=1
    )
    weight = torch.cat([head.predictors[name].weight for name in ("res2", "res3", "res5")], dim=1)
    expected = F.conv2d(together, weight, head.predictors["res2"].bias)
    assert torch.allclose(head.layers(maps), expected, atol=1e-5)
    assert sum(p.numel() for p in head.parameters()) == 3 * (4 + 8 + 12) + 3


@pytest.mark.parametrize("make", [linear, uper])
def test_sizes_and_gradients(make) -> None:
    head = make()
    targets = torch.randint(0, 3, (2, 64, 96))
    none, losses = head(features(), targets)
    assert none is None and list(losses) == ["loss_sem_seg"]
    losses["loss_sem_seg"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    logits, nothing = head.eval()(features())
    assert logits.shape == (2, 3, 64, 96) and nothing == {}


@pytest.mark.parametrize("make", [linear, uper])
@pytest.mark.parametrize("h, w", [(1, 1), (5, 3), (1, 40)])
def test_any_size_of_map(make, h: int, w: int) -> None:
    logits, _ = make().eval()(features(h, w, B=1))
    assert logits.shape == (1, 3, 4 * h, 4 * w) and logits.isfinite().all()


@pytest.mark.parametrize("make", [linear, uper])
def test_loss_counts_labelled_pixels_only(make) -> None:
    head = make(loss_weight=2.0)
    logits = torch.zeros(1, 3, 4, 4, requires_grad=True)
    targets = torch.full((1, 16, 16), 255)
    assert head.loss(logits, targets).item() == 0  # not 0 / 0
    targets[0, 3, 3] = 1
    assert math.isclose(head.loss(logits, targets).item(), math.log(3), rel_tol=1e-6)
    _, losses = head(features(), torch.full((2, 64, 96), 255))
    assert losses["loss_sem_seg"].item() == 0


def test_upernet_says_which_widths_group_norm_takes() -> None:
    for width in (8, 32, 100):
        with pytest.raises(ValueError, match="64 or more"):
            uper(conv_dims=width, norm="GN")
    uper(conv_dims=64, norm="GN")
