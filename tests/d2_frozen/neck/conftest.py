from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone


class TinyBottomUp(Backbone):
    """Four maps of strides 4..32 with 4, 8, 12, 16 channels, made by one strided convolution each."""

    def __init__(self, divisibility: int = 0, constraints: dict[str, int] | None = None):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(3, 4 * (i + 1), kernel_size=4 << i, stride=4 << i) for i in range(4)
        )
        self.divisibility, self.constraints = divisibility, constraints or {}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {f"res{i + 2}": conv(images) for i, conv in enumerate(self.convs)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"res{i + 2}": ShapeSpec(channels=4 * (i + 1), stride=4 << i) for i in range(4)}

    @property
    def size_divisibility(self) -> int:
        return self.divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return self.constraints


@pytest.fixture
def tiny_bottom_up() -> TinyBottomUp:
    torch.manual_seed(0)
    return TinyBottomUp()


@pytest.fixture
def make_bottom_up() -> type[TinyBottomUp]:
    return TinyBottomUp
