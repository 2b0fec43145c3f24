"""Neck: bottom-up maps -> pyramid, by layers of bidirectional, weighted fusion.

In: {"res2".."res5"}: (B, C_i, H/s, W/s), strides s = 4..32 pixels.
Out: {"p2".."p6"}: (B, C, H/s, W/s), strides 4..64.
Method: BiFPN, EfficientDet, arXiv:1911.09070, section 3. The tests compare it with effdet 0.4.1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn

from d2_frozen.act_checkpoint import ActCheckpointLayer
from d2_frozen.neck.cpu_layout import PointwiseConv2d, channels_last_on_cpu
from d2_frozen.neck.padding import PadsForBottomUp
from d2_frozen.neck.weighted_sum import weighted_sum
from detectron2.layers import get_norm
from detectron2.modeling.backbone import Backbone

FUSE_TYPES = ("fast_normalized", "softmax", "sum")
# At the start: share of the random filters on top of the identity, and the weight of the neighbouring level's map where
# one of the node's own level has 1.
_RANDOM_SHARE, _NEIGHBOUR = 0.1, 0.2

# Name in detectron2.layers.get_norm ("" for none), or channels -> module.
Norm = str | Callable[[int], nn.Module]


class BiFPN(PadsForBottomUp, Backbone):
    """BiFPN on a bottom-up network.

    Each input is projected once (1x1 convolution and norm) to ``out_channels``; coarser levels follow by 3x3
    stride-2 max pooling of the last projection, and then belong to every layer like the others. EfficientDet
    projects P4 and P5 twice in its first layer, once per use; one projection is the simpler choice here.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        *,
        num_layers: int = 5,
        norm: Norm = "",
        separable: bool = True,
        fuse_type: str = "fast_normalized",
        num_pooled_levels: int = 1,
    ):
        """
        Args:
            bottom_up: a Detectron2 backbone whose ``in_features`` have strides that double.
            in_features: names of maps of ``bottom_up``, fine to coarse.
            out_channels: channels of every level, inside and out.
            num_layers: bidirectional layers, at least 1.
            norm: see ``Norm``; without one, activations fade in deep necks (logged).
            separable: depthwise 3x3 then pointwise 1x1 convolutions; else plain 3x3.
            fuse_type: one of ``FUSE_TYPES``.
            num_pooled_levels: levels on top of the last input.
        Raises:
            ValueError: strides do not double, or an argument is out of range.
        """
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"MODEL.BIFPN.NUM_LAYERS is {num_layers}; BiFPN needs at least one layer.")
        if not norm:
            logging.getLogger(__name__).warning(
                "BiFPN without norm (MODEL.FPN.NORM: ''): a signal gets weaker at each of its nodes. "
                "Set MODEL.FPN.NORM to GN, BN or SyncBN unless this is on purpose."
            )
        strides, shapes = input_strides(bottom_up, in_features), bottom_up.output_shape()
        self.bottom_up = bottom_up
        self.in_features = tuple(in_features)
        self.num_pooled_levels = num_pooled_levels
        strides += [strides[-1] * 2 ** (i + 1) for i in range(num_pooled_levels)]

        self.projections = nn.ModuleDict(
            {name: _projection(shapes[name].channels, out_channels, norm) for name in in_features}
        )
        self.layers = nn.Sequential(
            *(BiFPNLayer(out_channels, len(strides), norm, separable, fuse_type) for _ in range(num_layers))
        )

        self._out_features = [f"p{int(math.log2(stride))}" for stride in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides))
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) images, normalised and padded -> maps by name, fine to coarse."""
        bottom_up = self.bottom_up(images)
        levels = [self.projections[name](channels_last_on_cpu(bottom_up[name])) for name in self.in_features]
        for _ in range(self.num_pooled_levels):
            levels.append(_halve(levels[-1]))
        return dict(zip(self._out_features, self.layers(levels)))


class BiFPNLayer(ActCheckpointLayer):
    """One top-down pass, then one bottom-up pass that also sees the layer's input (Figure 2d of the paper).

    Each node starts near the identity on the maps of its own level. EfficientDet's starts at random, with equal weights
    of all maps, and so mixes channels and levels once per node: a deep neck has to unlearn that before heads see what
    is where. Measured in docs/results.md, "Start of the BiFPN".

    With inputs x_0 (finest) .. x_{n-1}, and node = conv(act(fuse(...))):
        t_i = node(x_i, up(t_{i+1})),            i = n-2 .. 0,   t_{n-1} = x_{n-1}
        y_i = node(x_i, t_i, down(y_{i-1})),     i = 1 .. n-2,   y_0 = t_0
        y_{n-1} = node(x_{n-1}, down(y_{n-2}))
    """

    def __init__(
        self,
        channels: int,
        num_levels: int,
        norm: Norm = "",
        separable: bool = True,
        fuse_type: str = "fast_normalized",
    ):
        super().__init__()
        if num_levels < 2:
            raise ValueError(f"a BiFPN layer joins at least two levels, not {num_levels}.")

        def node(num_inputs: int) -> _Node:
            return _Node(num_inputs, channels, norm, separable, fuse_type)

        # Position i of top_down makes t_i; position i of bottom_up makes y_{i+1}.
        self.top_down = nn.ModuleList(node(2) for _ in range(num_levels - 1))
        self.bottom_up = nn.ModuleList(node(3 if i < num_levels - 1 else 2) for i in range(1, num_levels))

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C, h_i, w_i), each half the one before (rounded up) -> maps of the same shapes."""
        shares = shares_of([node.fuse for node in (*self.top_down, *self.bottom_up)])
        of_top_down, of_bottom_up = shares[: len(self.top_down)], shares[len(self.top_down) :]
        down = list(inputs)
        for i in reversed(range(len(inputs) - 1)):
            down[i] = self.top_down[i]([inputs[i], _resize_up(down[i + 1], inputs[i])], of_top_down[i])
        out = down[:1]
        for i in range(1, len(inputs)):
            # The coarsest level has no top-down node: its t is its input, which must not count twice.
            own = [inputs[i]] if i == len(inputs) - 1 else [inputs[i], down[i]]
            out.append(self.bottom_up[i - 1]([*own, _halve(out[-1])], of_bottom_up[i - 1]))
        return out


class WeightedFusion(nn.Module):
    """Sum of maps with one learned weight each (section 3.3).

    fast_normalized: relu(w_i) / (1e-4 + sum_j relu(w_j)).  softmax: exp(w_i) / sum_j exp(w_j).
    sum: plain sum, no parameters.
    """

    epsilon = 1e-4

    def __init__(self, num_inputs: int, fuse_type: str = "fast_normalized"):
        super().__init__()
        if fuse_type not in FUSE_TYPES:
            raise ValueError(
                f"MODEL.BIFPN.FUSE_TYPE is {fuse_type!r}; choose one of {', '.join(FUSE_TYPES)}."
            )
        self.fuse_type = fuse_type
        if fuse_type != "sum":
            self.weights = nn.Parameter(torch.ones(num_inputs))

    def forward(self, maps: Sequence[Tensor], shares: Tensor | None = None) -> Tensor:
        """Maps of one shape -> their weighted sum; ``shares`` where they have been computed."""
        if self.fuse_type == "sum":
            return sum(maps[1:], start=maps[0])
        return weighted_sum(self.shares() if shares is None else shares, maps)

    def shares(self) -> Tensor:
        """(num_inputs,) normalised weights, as they multiply the inputs."""
        return self._normalised(self.weights)

    def _normalised(self, weights: Tensor) -> Tensor:
        """(.., num_inputs) -> the same."""
        if self.fuse_type == "softmax":
            return weights.softmax(dim=-1)
        positive = weights.relu()
        return positive / (positive.sum(-1, keepdim=True) + self.epsilon)


def shares_of(fusions: Sequence[WeightedFusion]) -> list[Tensor | None]:
    """The shares of each, None where they are plain sums; all at once, as a GPU waits for each operation."""
    found: list[Tensor | None] = [None] * len(fusions)
    for size in {len(one.weights) for one in fusions if one.fuse_type != "sum"}:
        which = [i for i, one in enumerate(fusions) if len(one.weights) == size]
        together = fusions[which[0]]._normalised(torch.stack([fusions[i].weights for i in which]))
        for i, shares in zip(which, together.unbind()):
            found[i] = shares
    return found


class _Node(nn.Module):
    """Fuse, then activation, convolution and norm in this order, as the reference does."""

    def __init__(self, num_inputs: int, channels: int, norm: Norm, separable: bool, fuse_type: str):
        super().__init__()
        self.fuse = WeightedFusion(num_inputs, fuse_type)
        bias = not norm
        if separable:
            convs = [
                nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
                PointwiseConv2d(channels, channels, bias=bias),
            ]
        else:
            convs = [nn.Conv2d(channels, channels, 3, padding=1, bias=bias)]
        for conv in convs:
            _start_near_identity(conv)
        _start_from_own_level(self.fuse)
        self.conv = nn.Sequential(*convs)
        self.norm = get_norm(norm, channels) or nn.Identity()

    def forward(self, maps: Sequence[Tensor], shares: Tensor | None) -> Tensor:
        return self.norm(self.conv(F.silu(self.fuse(maps, shares))))


def _start_near_identity(conv: nn.Conv2d) -> None:
    """Each channel keeps its map, and gets a share of the random start on top."""
    c2_xavier_fill(conv)
    channels = torch.arange(conv.out_channels)
    own = channels if conv.groups == 1 else 0
    middle = conv.kernel_size[0] // 2
    with torch.no_grad():
        conv.weight.mul_(_RANDOM_SHARE)
        conv.weight[channels, own, middle, middle] += 1


def _start_from_own_level(fusion: WeightedFusion) -> None:
    """The last map of a node, that of the level beside, counts for less than those of its own."""
    if fusion.fuse_type != "sum":
        logarithmic = fusion.fuse_type == "softmax"
        with torch.no_grad():
            fusion.weights[-1] = fusion.weights[0] + math.log(_NEIGHBOUR) if logarithmic else _NEIGHBOUR


def input_strides(bottom_up: Backbone, in_features: Sequence[str]) -> list[int]:
    """Strides in pixels of ``in_features``.

    Raises:
        ValueError: a name that ``bottom_up`` does not give, or strides that do not double.
    """
    shapes = bottom_up.output_shape()
    missing = [name for name in in_features if name not in shapes]
    if missing or not in_features:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {list(in_features)}, but the bottom-up network gives {list(shapes)}."
        )
    strides = [shapes[name].stride for name in in_features]
    if any(coarse != 2 * fine for fine, coarse in zip(strides, strides[1:])):
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES {list(in_features)} have strides {strides}; they must double."
        )
    return strides


def _projection(in_channels: int, out_channels: int, norm: Norm) -> nn.Sequential:
    conv = PointwiseConv2d(in_channels, out_channels, bias=not norm)
    c2_xavier_fill(conv)
    return nn.Sequential(conv, get_norm(norm, out_channels) or nn.Identity())


def _halve(fine: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, ceil(h/2), ceil(w/2))."""
    return F.max_pool2d(fine, kernel_size=3, stride=2, padding=1)


def _resize_up(coarse: Tensor, like: Tensor) -> Tensor:
    # By size, not by factor: half of an odd fine side is rounded up. Nearest then still reads coarse pixel
    # floor(i / 2) for fine pixel i.
    return F.interpolate(coarse, size=like.shape[-2:], mode="nearest")
