"""How do images of different sizes become one batch: padded at the right and bottom, true sizes kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, device


class ImageList:
    """A padded batch that remembers the size of every image.

    Attributes:
        tensor: (B, H, W) or (B, C, H, W).
        image_sizes: B pairs (height, width) in pixels, before padding.
    """

    def __init__(self, tensor: Tensor, image_sizes: list[tuple[int, int]]) -> None:
        self.tensor = tensor
        self.image_sizes = image_sizes

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, idx: int) -> Tensor:
        """Image ``idx`` without its padding, a view."""
        height, width = self.image_sizes[idx]
        return self.tensor[idx, ..., :height, :width]

    def to(self, *args: Any, **kwargs: Any) -> ImageList:
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    @property
    def device(self) -> device:
        return self.tensor.device

    @staticmethod
    def from_tensors(
        tensors: Sequence[Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: dict[str, int] | None = None,
    ) -> ImageList:
        """Pad to one common size and stack.

        Args:
            tensors: images (..., h, w) of equal leading shape.
            size_divisibility: both sides of the batch become a multiple of it (0 or 1: as they are).
            pad_value: what fills the padding.
            padding_constraints: what a backbone asks for. "square_size" > 0 makes the batch a square of that
                side (then rounded up to the divisibility); "size_divisibility" takes the place of the
                argument.
        Raises:
            AssertionError: no images, something that is no tensor, or different leading shapes.
            ValueError: an image is larger than "square_size".
        """
        assert isinstance(tensors, (list, tuple)), f"a list of images is needed, not {type(tensors).__name__}"
        assert len(tensors) > 0, "ImageList.from_tensors: the list of images is empty"
        lead = tensors[0].shape[:-2]
        for image in tensors:
            assert isinstance(image, Tensor), f"images must be tensors, not {type(image).__name__}"
            assert image.shape[:-2] == lead, (
                f"images of one batch differ in more than height and width: {tuple(image.shape)} beside "
                f"{tuple(tensors[0].shape)}"
            )
        image_sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in tensors]
        batch_hw = _padded_size(image_sizes, size_divisibility, padding_constraints or {})

        if all(size == batch_hw for size in image_sizes):
            return ImageList(torch.stack(list(tensors)), image_sizes)
        batch = tensors[0].new_empty((len(tensors), *lead, *batch_hw))
        for slot, image, (height, width) in zip(batch, tensors, image_sizes):
            slot[..., :height, :width].copy_(image)
            slot[..., :height, width:].fill_(pad_value)
            slot[..., height:, :].fill_(pad_value)
        return ImageList(batch, image_sizes)


def _padded_size(
    image_sizes: list[tuple[int, int]], divisibility: int, constraints: dict[str, int]
) -> tuple[int, int]:
    height, width = (max(side) for side in zip(*image_sizes))
    square = constraints.get("square_size", 0)
    if square > 0:
        if max(height, width) > square:
            raise ValueError(
                f"an image of {height}x{width} pixels does not fit the {square}x{square} square that the "
                "backbone asks for. Lower INPUT.MAX_SIZE_TRAIN and INPUT.MAX_SIZE_TEST, or raise that size."
            )
        height = width = square
    divisibility = constraints.get("size_divisibility", divisibility)
    if divisibility > 1:
        height = -(-height // divisibility) * divisibility
        width = -(-width // divisibility) * divisibility
    return height, width
