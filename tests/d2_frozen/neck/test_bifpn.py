"""BiFPN against effdet's numbers, and the facts of its shapes, weights and registry."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from d2_frozen.neck import BiFPN, BiFPNLayer, WeightedFusion

GOLDEN = Path(__file__).parent / "golden"
FACTS = json.loads((GOLDEN / "bifpn.json").read_text())
ARRAYS = np.load(GOLDEN / "bifpn.npz")
EVEN = [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]
ODD = [(25, 37), (13, 19), (7, 10), (4, 5), (2, 3)]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def filled(key: str, shape: list[int]) -> Tensor:
    """The golden data's value of one state_dict entry (its README, "Filling rules")."""
    leaf, n = key.rsplit(".", 1)[-1], normal(zlib.crc32(key.encode()), *shape)
    if leaf == "running_var":
        return n.abs() + 0.5
    if leaf == "running_mean":
        return 0.1 * n
    if leaf == "weight" and len(shape) == 1:
        return 1 + 0.1 * n
    return n / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.02 * n


def effdet_batch_norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def layer_from_effdet(num_levels: int = 5) -> BiFPNLayer:
    """Our layer with the golden weights; effdet's node i < 4 is top-down level 3 - i."""
    layer = BiFPNLayer(8, num_levels, norm=effdet_batch_norm)
    theirs = {key: filled(key, shape) for key, shape in FACTS["layer_state"] if shape}
    theirs |= {key: torch.tensor(value) for key, value in FACTS["layer_edge_weights"].items()}
    names = {
        "after_combine.conv.conv_dw": "conv.0",
        "after_combine.conv.conv_pw": "conv.1",
        "after_combine.conv.bn": "norm",
        "combine.edge_weights": "fuse.weights",
    }
    ours = {}
    for key, value in theirs.items():
        _, node, rest = key.split(".", 2)
        place = f"top_down.{3 - int(node)}" if int(node) < 4 else f"bottom_up.{int(node) - 4}"
        old, new = next(pair for pair in names.items() if rest.startswith(pair[0]))
        ours[f"{place}.{rest.replace(old, new)}"] = value
    report = layer.load_state_dict(ours, strict=False)
    assert not report.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in report.missing_keys)
    return layer.eval()


@pytest.mark.parametrize("key", [key for key in ARRAYS.files if key.startswith("fuse.")])
def test_fusion_equals_effdet(key):
    weights = torch.tensor([float(w) for w in key.removeprefix("fuse.").split(",")])
    fuse = WeightedFusion(len(weights))
    with torch.no_grad():
        fuse.weights.copy_(weights)
        got = fuse([normal(301 + i, 2, 8, 6, 9) for i in range(len(weights))])
    torch.testing.assert_close(got, torch.from_numpy(ARRAYS[key]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "sizes"), [("even", EVEN), ("odd", ODD)])
def test_layer_equals_effdet(name, sizes):
    with torch.no_grad():
        got = layer_from_effdet()([normal(310 + i, 1, 8, *size) for i, size in enumerate(sizes)])
    for i, level in enumerate(got):
        expected = torch.from_numpy(ARRAYS[f"layer.{name}.out.P{i + 3}"])
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=2e-5)


def test_shares():
    """relu(1, 3, -2) / (4 + 1e-4) and the softmax of equal weights; a plain sum has no parameters."""
    fast, soft, plain = (WeightedFusion(3, kind) for kind in ("fast_normalized", "softmax", "sum"))
    with torch.no_grad():
        fast.weights.copy_(torch.tensor([1.0, 3.0, -2.0]))
    assert torch.allclose(fast.shares(), torch.tensor([1.0, 3.0, 0.0]) / 4.0001)
    assert torch.allclose(soft.shares(), torch.full((3,), 1 / 3))
    assert not list(plain.parameters())
    maps = [torch.full((1, 1, 2, 2), float(v)) for v in (1, 2, 3)]
    assert torch.equal(plain(maps), torch.full((1, 1, 2, 2), 6.0))
    with pytest.raises(ValueError, match=r"MODEL\.BIFPN\.FUSE_TYPE is 'mean'.*softmax"):
        WeightedFusion(2, "mean")


def test_every_parameter_gets_a_gradient():
    layer = BiFPNLayer(8, 4, norm=lambda c: nn.GroupNorm(2, c))
    sum(
        level.square().mean() for level in layer([normal(i, 1, 8, 16 >> i, 24 >> i) for i in range(4)])
    ).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_half_precision_stays_half_precision():
    fuse = WeightedFusion(2)
    maps = [torch.ones(1, 2, 3, 3, dtype=torch.bfloat16)] * 2
    assert fuse(maps).dtype is torch.bfloat16


def test_pyramid_on_a_size_that_is_no_multiple_of_64(tiny_bottom_up):
    neck = BiFPN(tiny_bottom_up, ["res2", "res3", "res4", "res5"], 8, num_layers=2, norm="BN")
    images = torch.zeros(2, 3, 96, 160)
    out = neck(images)
    strides = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert list(out) == list(strides) == list(neck.output_shape())
    for name, stride in strides.items():
        assert out[name].shape == (2, 8, -(-96 // stride), -(-160 // stride))
        assert (neck.output_shape()[name].stride, neck.output_shape()[name].channels) == (stride, 8)


def test_activations_keep_their_scale_through_nine_layers():
    """With a norm the last of 9 layers answers as strongly as the first."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(BiFPNLayer(16, 5, norm="BN") for _ in range(9)))
    out = layers([normal(i, 2, 16, *size) for i, size in enumerate(EVEN)])
    assert all(0.8 < level.std() < 1.2 for level in out)


@pytest.mark.parametrize("separable", [True, False])
def test_filters_start_near_the_identity(separable: bool) -> None:
    """1 from each channel to itself; on top a tenth of Xavier's uniform start, whose bound is sqrt(3 / inputs)."""
    torch.manual_seed(0)
    layer = BiFPNLayer(16, 4, separable=separable)
    for conv in (conv for node in [*layer.top_down, *layer.bottom_up] for conv in node.conv):
        off = conv.weight.detach().clone()
        middle = off.shape[-1] // 2
        off[:, :, middle, middle] -= torch.ones(16, 1) if conv.groups == 16 else torch.eye(16)
        assert 0 < off.abs().max() <= 0.1 * (3 / off[0].numel()) ** 0.5


@pytest.mark.parametrize("fuse_type", ["fast_normalized", "softmax"])
def test_maps_of_the_neighbouring_level_start_with_a_fifth_of_the_weight(fuse_type: str) -> None:
    layer = BiFPNLayer(8, 3, fuse_type=fuse_type)
    for node in layer.top_down:
        assert node.fuse.shares().tolist() == pytest.approx([1 / 1.2, 0.2 / 1.2], rel=1e-3)
    middle, top = (node.fuse.shares().tolist() for node in layer.bottom_up)
    assert middle == pytest.approx([1 / 2.2, 1 / 2.2, 0.2 / 2.2], rel=1e-3)
    assert top == pytest.approx([1 / 1.2, 0.2 / 1.2], rel=1e-3)


def test_what_is_at_one_place_stays_there_through_nine_layers() -> None:
    """At the start. With EfficientDet's, the map of the finest level is that of the coarse ones by then."""
    torch.manual_seed(0)
    layers = nn.Sequential(*(BiFPNLayer(16, 4, norm=lambda c: nn.GroupNorm(4, c)) for _ in range(9)))
    maps = [normal(i, 1, 16, 32 >> i, 32 >> i) for i in range(4)]
    other = [*maps]
    other[0] = maps[0].clone()
    other[0][:, :, :16] = normal(9, 1, 16, 16, 32)
    with torch.no_grad():
        change = (layers(maps)[0] - layers(other)[0]).abs().mean(dim=(0, 1, 3))
    assert change[:14].mean() > 5 * change[18:].mean()


@pytest.mark.parametrize("num_layers", [1, 5, 9])
def test_any_number_of_layers(tiny_bottom_up, num_layers):
    """The paper's Figure 4 goes from 1 to 9; every layer has the same number of parameters."""
    neck = BiFPN(tiny_bottom_up, ["res2", "res3", "res4", "res5"], 8, num_layers=num_layers, norm="BN")
    assert len(neck.layers) == num_layers
    assert len({sum(p.numel() for p in layer.parameters()) for layer in neck.layers}) == 1
    assert [level.shape[-1] for level in neck(torch.zeros(2, 3, 64, 64)).values()] == [16, 8, 4, 2, 1]


def test_bad_arguments(tiny_bottom_up):
    with pytest.raises(ValueError, match="NUM_LAYERS is 0"):
        BiFPN(tiny_bottom_up, ["res2", "res3"], 8, num_layers=0)
    with pytest.raises(ValueError, match=r"\['res2', 'res9'\].*gives \['res2', 'res3', 'res4', 'res5'\]"):
        BiFPN(tiny_bottom_up, ["res2", "res9"], 8)
    with pytest.raises(ValueError, match=r"strides \[4, 16\]"):
        BiFPN(tiny_bottom_up, ["res2", "res4"], 8)
