"""ResNet (He et al. 2016, arXiv:1512.03385) with ResNeXt groups, dilation and deformable convolutions.

In: images (B, 3, H, W).  Out: any of {"stem", "res2", "res3", "res4", "res5"} at strides 4, 4, 8, 16, 32,
or "linear" (B, num_classes) when it is built as a classifier.
Blocks fill their weights right after building them, main path first: seeded construction depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn

from detectron2.layers import CNNBlockBase, Conv2d, DeformConv, ModulatedDeformConv, ShapeSpec, get_norm

from .backbone import Backbone
from .build import BACKBONE_REGISTRY

# Earlier name of the same base class; projects still import it from here.
ResNetBlockBase = CNNBlockBase

_BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class ResNet(Backbone):
    """A stem, up to four stages, and optionally a classifier."""

    def __init__(
        self,
        stem: CNNBlockBase,
        stages: Sequence[Sequence[CNNBlockBase]],
        num_classes: int | None = None,
        out_features: Sequence[str] | None = None,
        freeze_at: int = 0,
    ):
        """
        Args:
            stem: first block; its ``stride`` is that of the whole stem.
            stages: blocks of res2, res3, ...
            num_classes: size of the "linear" output; None for no classifier.
            out_features: names to return. Default: the last one. Stages after the last name are dropped.
            freeze_at: see :meth:`freeze`.
        Raises:
            ValueError: a name in ``out_features`` that this network does not have.
        """
        super().__init__()
        self.stem = stem
        self.num_classes = num_classes

        if out_features is not None:
            wanted = [int(name[3:]) for name in out_features if name.startswith("res") and name[3:].isdigit()]
            # "linear" reads the last stage. (The original drops stages then too, and reads an earlier one.)
            if "linear" not in out_features:
                stages = stages[: max(wanted, default=1) - 1]

        stride, channels = stem.stride, stem.out_channels
        self._out_feature_strides: dict[str, int] = {"stem": stride}
        self._out_feature_channels: dict[str, int] = {"stem": channels}
        self.stage_names: tuple[str, ...] = tuple(f"res{i}" for i in range(2, 2 + len(stages)))
        self.stages: list[nn.Sequential] = []
        for name, blocks in zip(self.stage_names, stages):
            if not blocks or not all(isinstance(block, CNNBlockBase) for block in blocks):
                raise TypeError(
                    f"stage {name} of a ResNet must be a non-empty list of CNNBlockBase, got {blocks}"
                )
            for block in blocks:
                stride, channels = stride * block.stride, block.out_channels
            self._out_feature_strides[name] = stride
            self._out_feature_channels[name] = channels
            stage = nn.Sequential(*blocks)
            self.add_module(name, stage)
            self.stages.append(stage)

        if num_classes is not None:
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.linear = nn.Linear(channels, num_classes)
            nn.init.normal_(self.linear.weight, std=0.01)  # section 5.1 of arXiv:1706.02677

        if out_features is None:
            out_features = ["stem", *self.stage_names, *(["linear"] if num_classes is not None else [])][-1:]
        self._out_features = list(out_features)
        own = {name for name, _ in self.named_children()}
        missing = [name for name in self._out_features if name not in own]
        if missing or not self._out_features:
            raise ValueError(
                f"ResNet has no output {missing}; it has {sorted(own)} (MODEL.RESNETS.OUT_FEATURES)"
            )
        self.freeze(freeze_at)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, C, H, W) -> the maps named in ``out_features``."""
        if x.dim() != 4:
            raise ValueError(f"ResNet takes images of shape (B, C, H, W), got {x.shape}")
        found: dict[str, torch.Tensor] = {}
        x = self.stem(x)
        if "stem" in self._out_features:
            found["stem"] = x
        for name, stage in zip(self.stage_names, self.stages):
            x = stage(x)
            if name in self._out_features:
                found[name] = x
        if self.num_classes is not None and "linear" in self._out_features:
            found["linear"] = self.linear(self.avgpool(x).flatten(1))
        return found

    def __prepare_scriptable__(self) -> Backbone:
        return self._with_module_lists("stages")

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(
                channels=self._out_feature_channels.get(name, self.num_classes),
                stride=self._out_feature_strides.get(name),
            )
            for name in self._out_features
        }

    def freeze(self, freeze_at: int = 0) -> ResNet:
        """Freeze the first ``freeze_at`` parts for good: 1 the stem, 2 also res2, ... 5 everything.

        Their parameters no longer require gradients and their batch norms become FrozenBatchNorm2d.
        """
        parts: list[Iterable[CNNBlockBase]] = [[self.stem], *self.stages]
        for part in parts[: max(freeze_at, 0)]:
            for block in part:
                block.freeze()
        return self

    @staticmethod
    def make_stage(
        block_class: type[CNNBlockBase],
        num_blocks: int,
        *,
        in_channels: int,
        out_channels: int,
        **kwargs: Any,
    ) -> list[CNNBlockBase]:
        """Build the blocks of one stage.

        Args:
            block_class: its constructor takes in_channels, out_channels, and ``kwargs``.
            num_blocks: how many.
            in_channels: of the first block; the others take ``out_channels``.
            kwargs: for every block. ``NAME_per_block=[...]`` gives each block its own ``NAME``.
        Raises:
            ValueError: a per-block list of wrong length, or both ``NAME`` and ``NAME_per_block``.
        """
        suffix = "_per_block"
        varying = {key[: -len(suffix)]: value for key, value in kwargs.items() if key.endswith(suffix)}
        fixed = {key: value for key, value in kwargs.items() if not key.endswith(suffix)}
        for key, values in varying.items():
            if key in fixed:
                raise ValueError(f"make_stage got both {key} and {key}{suffix}; give one of them")
            if len(values) != num_blocks:
                raise ValueError(f"{key}{suffix} has {len(values)} values for {num_blocks} blocks")
        blocks = []
        for i in range(num_blocks):
            own = {key: values[i] for key, values in varying.items()}
            blocks.append(block_class(in_channels=in_channels, out_channels=out_channels, **fixed, **own))
            in_channels = out_channels
        return blocks

    @staticmethod
    def make_default_stages(
        depth: int, block_class: type[CNNBlockBase] | None = None, **kwargs: Any
    ) -> list[list[CNNBlockBase]]:
        """The four stages of the standard network with ``depth`` layers (18, 34, 50, 101, 152).

        Args:
            block_class: default: BasicBlock up to 34 layers, BottleneckBlock above.
            kwargs: for :meth:`make_stage`; widths and strides are set here.
        """
        if block_class is None:
            block_class = BasicBlock if depth < 50 else BottleneckBlock
        first, widths = 64, [64, 128, 256, 512] if depth < 50 else [256, 512, 1024, 2048]
        stages = []
        for i, (num_blocks, width) in enumerate(zip(_BLOCKS_PER_STAGE[depth], widths)):
            options = dict(kwargs)
            if depth >= 50:
                options["bottleneck_channels"] = width // 4
            options["stride_per_block"] = [1 if i == 0 else 2] + [1] * (num_blocks - 1)
            stages.append(
                ResNet.make_stage(block_class, num_blocks, in_channels=first, out_channels=width, **options)
            )
            first = width
        return stages


# Function form, for projects written against the earlier API.
make_stage = ResNet.make_stage


class BasicStem(CNNBlockBase):
    """7x7 convolution with stride 2, ReLU, 3x3 max pooling with stride 2: stride 4 in all."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm: str = "BN"):
        super().__init__(in_channels, out_channels, 4)
        self.in_channels = in_channels
        self.conv1 = _conv(in_channels, out_channels, 7, norm, stride=2)
        c2_msra_fill(self.conv1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu_(self.conv1(x))  # (B, C, H/2, W/2)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)  # (B, C, H/4, W/4)


class _ResidualBlock(CNNBlockBase):
    """relu(shortcut(x) + main path(x)); the shortcut is a 1x1 convolution only where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str):
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = (
            None if in_channels == out_channels else _conv(in_channels, out_channels, 1, norm, stride=stride)
        )

    def _fill(self, *main_path: nn.Module) -> None:
        for conv in (*main_path, self.shortcut):
            if conv is not None:
                c2_msra_fill(conv)

    def main_path(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.main_path(x)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BasicBlock(_ResidualBlock):
    """Two 3x3 convolutions; the block of ResNet-18 and -34."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, norm: str = "BN"):
        super().__init__(in_channels, out_channels, stride, norm)
        self.conv1 = _conv(in_channels, out_channels, 3, norm, stride=stride)
        self.conv2 = _conv(out_channels, out_channels, 3, norm)
        self._fill(self.conv1, self.conv2)

    def main_path(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(F.relu_(self.conv1(x)))


class BottleneckBlock(_ResidualBlock):
    """1x1, 3x3, 1x1 convolutions; the block of ResNet-50 and deeper, and of ResNeXt."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: str = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
    ):
        """
        Args:
            bottleneck_channels: width of the 3x3 convolution, over all groups.
            num_groups: of the 3x3 convolution.
            stride_in_1x1: where the stride is. The first 1x1 in the weights of MSRA, the 3x3 in those of
                fb.torch and torchvision.
            dilation: of the 3x3 convolution.
        """
        super().__init__(in_channels, out_channels, stride, norm)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        width = bottleneck_channels
        self.conv1 = _conv(in_channels, width, 1, norm, stride=stride_1x1)
        self.conv2 = _conv(width, width, 3, norm, stride=stride_3x3, groups=num_groups, dilation=dilation)
        self.conv3 = _conv(width, out_channels, 1, norm)
        self._fill(self.conv1, self.conv2, self.conv3)

    def main_path(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))


class DeformBottleneckBlock(_ResidualBlock):
    """A bottleneck whose 3x3 convolution is deformable (arXiv:1703.06211, modulated: arXiv:1811.11168)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: str = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
    ):
        """
        Args:
            deform_modulated: also predict a weight in 0..1 for each sampling point.
            deform_num_groups: groups of input channels with their own offsets.
            others: as in :class:`BottleneckBlock`.
        """
        super().__init__(in_channels, out_channels, stride, norm)
        self.deform_modulated = deform_modulated
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        width = bottleneck_channels
        window = {"kernel_size": 3, "stride": stride_3x3, "padding": dilation, "dilation": dilation}
        # Nine points: x and y of each, and its weight if modulated.
        per_group = 27 if deform_modulated else 18
        deform_class = ModulatedDeformConv if deform_modulated else DeformConv

        self.conv1 = _conv(in_channels, width, 1, norm, stride=stride_1x1)
        self.conv2_offset = Conv2d(width, per_group * deform_num_groups, **window)
        self.conv2 = deform_class(
            width,
            width,
            bias=False,
            groups=num_groups,
            deformable_groups=deform_num_groups,
            norm=get_norm(norm, width),
            **window,
        )
        self.conv3 = _conv(width, out_channels, 1, norm)
        self._fill(self.conv1, self.conv2, self.conv3)
        # Start as an ordinary convolution: no displacement.
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)

    def main_path(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu_(self.conv1(x))
        where = self.conv2_offset(x)
        if self.deform_modulated:
            x_part, y_part, weight = where.chunk(3, dim=1)
            x = self.conv2(x, torch.cat((x_part, y_part), dim=1), weight.sigmoid())
        else:
            x = self.conv2(x, where)
        return self.conv3(F.relu_(x))


def _conv(in_channels: int, out_channels: int, kernel_size: int, norm: str, **kwargs: Any) -> Conv2d:
    """Convolution with norm and no bias, padded so that stride 1 keeps the size."""
    reach = kwargs.get("dilation", 1) * (kernel_size // 2)
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=reach,
        bias=False,
        norm=get_norm(norm, out_channels),
        **kwargs,
    )


@BACKBONE_REGISTRY.register()
def build_resnet_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """Build the network that ``MODEL.RESNETS`` describes, frozen up to ``MODEL.BACKBONE.FREEZE_AT``."""
    opts = cfg.MODEL.RESNETS
    assert opts.DEPTH in _BLOCKS_PER_STAGE, (
        f"MODEL.RESNETS.DEPTH: {opts.DEPTH} is none of {sorted(_BLOCKS_PER_STAGE)}"
    )
    assert opts.RES5_DILATION in (1, 2), (
        f"MODEL.RESNETS.RES5_DILATION: {opts.RES5_DILATION} is neither 1 nor 2"
    )
    shallow = opts.DEPTH < 50
    if shallow:
        _check_basic_blocks(opts)

    stem = BasicStem(input_shape.channels, opts.STEM_OUT_CHANNELS, opts.NORM)
    stages = []
    in_channels, out_channels = opts.STEM_OUT_CHANNELS, opts.RES2_OUT_CHANNELS
    width = opts.NUM_GROUPS * opts.WIDTH_PER_GROUP
    # Always all four, so that the weights of what is built next do not depend on OUT_FEATURES; ResNet drops
    # the stages that nobody reads.
    for number, num_blocks in enumerate(_BLOCKS_PER_STAGE[opts.DEPTH], start=2):
        dilation = opts.RES5_DILATION if number == 5 else 1
        keeps_size = number == 2 or dilation == 2
        options: dict[str, Any] = {
            "stride_per_block": [1 if keeps_size else 2] + [1] * (num_blocks - 1),
            "norm": opts.NORM,
        }
        block_class: type[CNNBlockBase] = BasicBlock
        if not shallow:
            block_class = BottleneckBlock
            options.update(
                bottleneck_channels=width,
                num_groups=opts.NUM_GROUPS,
                stride_in_1x1=opts.STRIDE_IN_1X1,
                dilation=dilation,
            )
            if opts.DEFORM_ON_PER_STAGE[number - 2]:
                block_class = DeformBottleneckBlock
                options.update(
                    deform_modulated=opts.DEFORM_MODULATED, deform_num_groups=opts.DEFORM_NUM_GROUPS
                )
        stages.append(
            ResNet.make_stage(
                block_class, num_blocks, in_channels=in_channels, out_channels=out_channels, **options
            )
        )
        in_channels, out_channels, width = out_channels, out_channels * 2, width * 2
    return ResNet(stem, stages, out_features=opts.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


def _check_basic_blocks(opts) -> None:
    """R18 and R34 have no bottleneck, so the options for it must keep their neutral values."""
    neutral = {
        "RES2_OUT_CHANNELS": 64,
        "RES5_DILATION": 1,
        "NUM_GROUPS": 1,
        "DEFORM_ON_PER_STAGE": [False] * 4,
    }
    for key, value in neutral.items():
        seen = list(opts[key]) if isinstance(value, list) else opts[key]
        assert seen == value, f"MODEL.RESNETS.{key} must be {value} with DEPTH: {opts.DEPTH}, not {seen}"
