"""Where do the anchors lie? Boxes of fixed sizes and shapes around every cell of every feature map."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from detectron2._outside import outside_message, outside_subset
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from detectron2.utils.registry import Registry

__getattr__ = outside_subset(__name__, ("RotatedAnchorGenerator",))

ANCHOR_GENERATOR_REGISTRY = Registry("ANCHOR_GENERATOR")
ANCHOR_GENERATOR_REGISTRY.__doc__ = """Classes that give the anchors of a list of feature maps.

Called as ``cls(cfg, input_shape)`` with a list of ShapeSpec; see ``DefaultAnchorGenerator`` for what they
return.
"""


class BufferList(nn.Module):
    """Tensors that move with the module but are not in its state_dict."""

    def __init__(self, buffers: list[Tensor]) -> None:
        super().__init__()
        for index, tensor in enumerate(buffers):
            self.register_buffer(str(index), tensor, persistent=False)

    def __len__(self) -> int:
        return len(self._buffers)

    @torch.jit.unused
    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._buffers.values())


@ANCHOR_GENERATOR_REGISTRY.register()
class DefaultAnchorGenerator(nn.Module):
    """The anchors of Faster R-CNN (arXiv:1506.01497) and FPN (arXiv:1612.03144)."""

    # Numbers per anchor.
    box_dim: int = 4

    @configurable
    def __init__(
        self,
        *,
        sizes: list[list[float]],
        aspect_ratios: list[list[float]],
        strides: list[int],
        offset: float = 0.5,
    ) -> None:
        """
        Args:
            sizes: per feature map the anchor sizes: square roots of areas, input pixels. One entry serves all
                maps.
            aspect_ratios: per feature map the ratios height / width. One entry serves all maps.
            strides: input pixels per cell of each map.
            offset: where in its cell an anchor is centred, in 0..1 of the stride.
        """
        super().__init__()
        self.strides = strides
        self.num_features = len(strides)
        self.offset = offset
        assert 0.0 <= offset < 1.0, f"MODEL.ANCHOR_GENERATOR.OFFSET must be in [0, 1), not {offset}"
        self.cell_anchors = BufferList(
            [
                self.generate_cell_anchors(map_sizes, map_ratios).float()
                for map_sizes, map_ratios in zip(
                    _one_per_map(sizes, self.num_features, "SIZES"),
                    _one_per_map(aspect_ratios, self.num_features, "ASPECT_RATIOS"),
                )
            ]
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        options = cfg.MODEL.ANCHOR_GENERATOR
        return {
            "sizes": options.SIZES,
            "aspect_ratios": options.ASPECT_RATIOS,
            "strides": [shape.stride for shape in input_shape],
            "offset": options.OFFSET,
        }

    @property
    @torch.jit.unused
    def num_cell_anchors(self) -> list[int]:
        """Anchors per cell of each map."""
        return [len(anchors) for anchors in self.cell_anchors]

    @property
    @torch.jit.unused
    def num_anchors(self) -> list[int]:
        """The same as ``num_cell_anchors``."""
        return self.num_cell_anchors

    def generate_cell_anchors(
        self,
        sizes: tuple[float, ...] = (32, 64, 128, 256, 512),
        aspect_ratios: tuple[float, ...] = (0.5, 1, 2),
    ) -> Tensor:
        """Anchors around (0, 0), for every size all ratios: (sizes * ratios, 4) XYXY pixels."""
        corners = []
        for size in sizes:
            for ratio in aspect_ratios:
                width = math.sqrt(size**2.0 / ratio)
                height = ratio * width
                corners.append((-width / 2.0, -height / 2.0, width / 2.0, height / 2.0))
        return torch.tensor(corners)

    def forward(self, features: list[Tensor]) -> list[Boxes]:
        """
        Args:
            features: (B, C, H, W) each, as many as there are strides.
        Returns:
            Per map H * W * (anchors per cell) boxes in input pixels, ordered by row, column, cell anchor.
            They are the same for every image and are not clipped to it.
        """
        assert len(features) == self.num_features, (
            f"{len(features)} feature maps, but the anchors were made for {self.num_features}"
        )
        around_zero = [anchors for _, anchors in self.cell_anchors.named_buffers()]
        found: list[Boxes] = []
        for feature, stride, cell_anchors in zip(features, self.strides, around_zero):
            height, width = feature.shape[-2:]
            found.append(Boxes(_anchors_of_map(height, width, stride, self.offset, cell_anchors)))
        return found


def build_anchor_generator(cfg: CfgNode, input_shape: list[ShapeSpec]) -> nn.Module:
    """The anchor generator that MODEL.ANCHOR_GENERATOR.NAME names."""
    name = cfg.MODEL.ANCHOR_GENERATOR.NAME
    if name == "RotatedAnchorGenerator" and name not in ANCHOR_GENERATOR_REGISTRY:
        raise NotImplementedError(outside_message(f"MODEL.ANCHOR_GENERATOR.NAME={name}"))
    return ANCHOR_GENERATOR_REGISTRY.get(name)(cfg, input_shape)


def _anchors_of_map(height: int, width: int, stride: int, offset: float, around_zero: Tensor) -> Tensor:
    y, x = torch.meshgrid(
        _cell_centers(height, stride, offset, around_zero),
        _cell_centers(width, stride, offset, around_zero),
        indexing="ij",
    )
    shift = torch.stack((x, y, x, y), dim=2)  # (H, W, 4)
    return (shift[:, :, None] + around_zero).reshape(-1, 4)


def _cell_centers(cells: int, stride: int, offset: float, like: Tensor) -> Tensor:
    start, end = offset * stride, cells * stride
    return torch.arange(start, end, step=stride, dtype=torch.float32, device=like.device)


def _one_per_map(values: list, num_maps: int, key: str) -> list[list[float]]:
    """Bring a setting to one list per feature map."""
    where = f"MODEL.ANCHOR_GENERATOR.{key}"
    is_list = isinstance(values, Sequence) and not isinstance(values, str)
    assert is_list, f"{where} must be a list of lists, not {values!r}"
    assert len(values) > 0, f"{where} is empty"
    if not isinstance(values[0], Sequence):
        return [values] * num_maps
    if len(values) == 1:
        return [values[0]] * num_maps
    assert len(values) == num_maps, (
        f"{where} has {len(values)} entries, but there are {num_maps} feature maps"
    )
    return list(values)
