"""How do images of different sizes become one batch: padded at the right and bottom, true sizes kept.

Works in TorchScript. In a trace the sizes stay symbolic: the traced function takes images of other sizes too.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, device


class ImageList:
    """A padded batch that remembers the size of every image.

    Attributes:
        tensor: (B, H, W) or (B, C, H, W).
        image_sizes: B pairs (height, width) in pixels, before padding; tensors (2,) in a trace.
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

    @torch.jit.unused
    def to(self, *args: Any, **kwargs: Any) -> "ImageList":
        return ImageList(self.tensor.to(*args, **kwargs), self.image_sizes)

    @property
    def device(self) -> device:
        return self.tensor.device

    @staticmethod
    def from_tensors(
        tensors: list[Tensor],
        size_divisibility: int = 0,
        pad_value: float = 0.0,
        padding_constraints: dict[str, int] | None = None,
    ) -> "ImageList":
        """Pad to one common size and stack.

        Args:
            tensors: list or tuple of images (..., h, w) of equal leading shape.
            size_divisibility: both sides of the batch become a multiple of it (0 or 1: as they are).
            pad_value: what fills the padding.
            padding_constraints: what a backbone asks for. "square_size" > 0 makes the batch a square of that
                side (then rounded up to the divisibility); "size_divisibility" takes the place of the
                argument.
        Raises:
            AssertionError: no images, something that is no tensor, or different leading shapes.
            ValueError: an image is larger than "square_size".
        """
        assert isinstance(tensors, (list, tuple)), "ImageList.from_tensors: a list of images is needed"
        assert len(tensors) > 0, "ImageList.from_tensors: the list of images is empty"
        lead = tensors[0].shape[:-2]
        for image in tensors:
            assert isinstance(image, Tensor), "ImageList.from_tensors: images must be tensors"
            assert image.shape[:-2] == lead, (
                f"images of one batch differ in more than height and width: {image.shape} beside {tensors[0].shape}"
            )
        constraints: dict[str, int] = {}
        if padding_constraints is not None:
            constraints = padding_constraints
        if torch.jit.is_tracing():
            return _from_traced(tensors, size_divisibility, pad_value, constraints)

        image_sizes = [(image.shape[-2], image.shape[-1]) for image in tensors]
        height, width = _padded_size(
            max([size[0] for size in image_sizes]),
            max([size[1] for size in image_sizes]),
            size_divisibility,
            constraints,
        )
        if all([size == (height, width) for size in image_sizes]):
            return ImageList(torch.stack(tensors), image_sizes)
        batch = tensors[0].new_empty([len(tensors)] + list(lead) + [height, width])
        for i, image in enumerate(tensors):
            h, w = image_sizes[i]
            slot = batch[i]
            slot[..., :h, :w].copy_(image)
            slot[..., :h, w:].fill_(pad_value)
            slot[..., h:, :].fill_(pad_value)
        return ImageList(batch, image_sizes)


@torch.jit.unused
def _from_traced(
    tensors: list[Tensor], divisibility: int, pad_value: float, constraints: dict[str, int]
) -> ImageList:
    """Tensor arithmetic throughout, as a Python number would be a constant of the trace."""
    sizes = [torch.stack((image.shape[-2], image.shape[-1])) for image in tensors]
    height, width = _padded_size(*torch.stack(sizes).amax(dim=0), divisibility, constraints)
    images = [
        F.pad(image, (0, width - size[1], 0, height - size[0]), value=pad_value)
        for image, size in zip(tensors, sizes)
    ]
    return ImageList(torch.stack(images), sizes)


def _padded_size(height: int, width: int, divisibility: int, constraints: dict[str, int]) -> tuple[int, int]:
    """Size of a batch whose largest sides are ``height`` and ``width``."""
    square = constraints.get("square_size", 0)
    if square > 0:
        if max(height, width) > square:
            raise ValueError(
                f"an image of {height}x{width} pixels does not fit the {square}x{square} square that the "
                "backbone asks for. Lower INPUT.MAX_SIZE_TRAIN and INPUT.MAX_SIZE_TEST, or raise that size."
            )
        height = square
        width = square
    divisibility = constraints.get("size_divisibility", divisibility)
    if divisibility > 1:
        height = (height + divisibility - 1) // divisibility * divisibility
        width = (width + divisibility - 1) // divisibility * divisibility
    return height, width
