"""What is a box here: N axis-aligned boxes in absolute XYXY pixels, their geometry, and other encodings.

Coordinates are continuous: a box (x0, y0, x1, y1) has width x1 - x0, and pixel (0, 0) covers [0, 1) x [0, 1).
Boxes can be used in TorchScript, whose types are narrower: annotations name what it may pass.
"""

import math
from enum import IntEnum, unique
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, device

RawBoxes = TypeVar("RawBoxes", list, tuple, np.ndarray, Tensor)


class Boxes:
    """N boxes as one float32 tensor.

    Attributes:
        tensor: (N, 4), float32, absolute pixels (x0, y0, x1, y1).
    """

    def __init__(self, tensor: Tensor) -> None:
        """
        Args:
            tensor: (N, 4); outside of TorchScript also an array or a nested list. Anything without elements
                becomes (0, 4).
        """
        if isinstance(tensor, Tensor):
            coords = tensor.to(torch.float32)
        else:
            coords = torch.as_tensor(tensor, dtype=torch.float32, device=torch.device("cpu"))
        if coords.numel() == 0:
            coords = coords.reshape(-1, 4)  # an image without objects often comes as a 1-d empty list
        assert coords.dim() == 2 and coords.shape[1] == 4, f"Boxes wants shape (N, 4), got {coords.shape}"
        self.tensor = coords

    def clone(self) -> "Boxes":
        """Boxes with their own memory."""
        return Boxes(self.tensor.clone())

    def to(self, device: torch.device) -> "Boxes":
        return Boxes(self.tensor.to(device=device))

    @property
    def device(self) -> device:
        return self.tensor.device

    def area(self) -> Tensor:
        """(N,) square pixels; negative where exactly one side is inverted."""
        t = self.tensor
        return (t[:, 2] - t[:, 0]) * (t[:, 3] - t[:, 1])

    def clip(self, box_size: tuple[int, int]) -> None:
        """Cut, in place, to an image.

        Args:
            box_size: (height, width) in pixels.
        Raises:
            AssertionError: a coordinate is inf or nan (training has usually diverged then).
        """
        t = self.tensor
        assert torch.isfinite(t).all(), "Boxes.clip: a coordinate is inf or nan; has the training diverged?"
        height, width = box_size
        xs = t[:, 0::2].clamp(min=0, max=width)
        ys = t[:, 1::2].clamp(min=0, max=height)
        self.tensor = torch.stack((xs, ys), dim=2).flatten(1)  # (N, corner, xy) -> (N, 4)

    def nonempty(self, threshold: float = 0.0) -> Tensor:
        """(N,) bool: both sides are longer than ``threshold`` pixels."""
        t = self.tensor
        return (t[:, 2] - t[:, 0] > threshold) & (t[:, 3] - t[:, 1] > threshold)

    def inside_box(self, box_size: tuple[int, int], boundary_threshold: int = 0) -> Tensor:
        """(N,) bool: inside the image (height, width) grown by ``boundary_threshold`` pixels on each side."""
        height, width = box_size
        x0, y0, x1, y1 = self.tensor.unbind(1)
        starts_inside = (x0 >= -boundary_threshold) & (y0 >= -boundary_threshold)
        return starts_inside & (x1 < width + boundary_threshold) & (y1 < height + boundary_threshold)

    def get_centers(self) -> Tensor:
        """(N, 2) as (x, y)."""
        return (self.tensor[:, :2] + self.tensor[:, 2:]) / 2

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Multiply the coordinates in place; the tensor given to the constructor changes with them."""
        self.tensor[:, 0::2] *= scale_x
        self.tensor[:, 1::2] *= scale_y

    @classmethod
    def cat(cls, boxes_list: list["Boxes"]) -> "Boxes":
        """All boxes of a list (or tuple) in order; an empty list gives (0, 4)."""
        assert isinstance(boxes_list, (list, tuple)), "Boxes.cat: a list of Boxes is needed"
        assert all([isinstance(b, Boxes) for b in boxes_list]), "Boxes.cat: every entry must be a Boxes"
        if len(boxes_list) == 0:
            return cls(torch.empty(0))
        return cls(torch.cat([b.tensor for b in boxes_list], dim=0))

    def __getitem__(self, item) -> "Boxes":  # without a type, TorchScript takes a tensor
        """Index, slice, bool mask (N,) or long indices; always Boxes, one box for an integer."""
        picked = self.tensor[item]
        if isinstance(item, int):
            picked = picked[None]
        assert picked.dim() == 2, f"indexing Boxes with {item} does not select whole boxes"
        return Boxes(picked)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    @torch.jit.unused
    def __iter__(self):  # no type, as TorchScript has none for it
        """Boxes one by one, each (4,)."""
        return iter(self.tensor)

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"


@unique
class BoxMode(IntEnum):
    """How the numbers of a box are meant. The values stand in dataset dicts and files, so they are fixed.

    ABS is pixels, REL is a fraction of the image side. XYWHA_ABS is (x_center, y_center, w, h, angle in
    degrees, counter-clockwise).
    """

    XYXY_ABS = 0
    XYWH_ABS = 1
    XYXY_REL = 2
    XYWH_REL = 3
    XYWHA_ABS = 4

    @staticmethod
    def convert(box: RawBoxes, from_mode: "BoxMode", to_mode: "BoxMode") -> RawBoxes:
        """Boxes in another mode. The input is not changed; for equal modes it is returned itself.

        Args:
            box: one box as list or tuple of 4 (or 5) numbers, or (N, 4) / (N, 5) array or tensor.
        Returns:
            The same type as ``box`` and, for arrays and tensors, the same dtype.
        Raises:
            AssertionError: a REL mode (the image size would be needed), or not 4 / 5 numbers per box.
            NotImplementedError: no conversion between the two modes exists.
        """
        if from_mode == to_mode:
            return box
        is_sequence = isinstance(box, (list, tuple))
        if is_sequence:
            source = torch.tensor(box)[None]
            assert source.dim() == 2, f"a list or tuple is one box, not several: {box}"
        elif isinstance(box, np.ndarray):
            source = torch.from_numpy(np.asarray(box))
        else:
            source = box
        assert source.shape[-1] in (4, 5), f"a box has 4 numbers (5 with an angle), got {source.shape[-1]}"
        needs_image_size = {BoxMode.XYXY_REL, BoxMode.XYWH_REL} & {from_mode, to_mode}
        assert not needs_image_size, "relative box modes cannot be converted without the image size"

        convert_tensor = _CONVERSIONS.get((from_mode, to_mode))
        if convert_tensor is None:
            raise NotImplementedError(
                f"no conversion from {BoxMode(from_mode).name} to {BoxMode(to_mode).name} boxes"
            )
        converted = convert_tensor(source)
        if is_sequence:
            return type(box)(converted[0].tolist())
        return converted.numpy() if isinstance(box, np.ndarray) else converted


def _xyxy_to_xywh(boxes: Tensor) -> Tensor:
    converted = boxes.clone()
    converted[..., 2:4] -= boxes[..., :2]
    return converted


def _xywh_to_xyxy(boxes: Tensor) -> Tensor:
    converted = boxes.clone()
    converted[..., 2:4] += boxes[..., :2]
    return converted


def _xywh_to_xywha(boxes: Tensor) -> Tensor:
    assert boxes.shape[-1] == 4, f"XYWH boxes have 4 numbers, got {boxes.shape[-1]}"
    exact = boxes.double()
    sides = exact[..., 2:]
    angle = torch.zeros_like(exact[..., :1])
    return torch.cat((exact[..., :2] + sides / 2, sides, angle), dim=-1).to(boxes.dtype)


def _xywha_to_xyxy(boxes: Tensor) -> Tensor:
    """The smallest axis-aligned box around each rotated one."""
    assert boxes.shape[-1] == 5, f"XYWHA boxes have 5 numbers, got {boxes.shape[-1]}"
    center, w, h = boxes[..., :2].double(), boxes[..., 2].double(), boxes[..., 3].double()
    angle = boxes[..., 4].double() * (math.pi / 180.0)
    c, s = angle.cos().abs(), angle.sin().abs()
    half = torch.stack((c * w + s * h, c * h + s * w), dim=-1) / 2
    return torch.cat((center - half, center + half), dim=-1).to(boxes.dtype)


_CONVERSIONS = {
    (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS): _xyxy_to_xywh,
    (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS): _xywh_to_xyxy,
    (BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS): _xywh_to_xywha,
    (BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS): _xywha_to_xyxy,
}


def pairwise_intersection(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Overlap of every box with every other: (N, M), square pixels."""
    # One axis at a time: contiguous (N, M) planes instead of (N, M, 2) and a reduction over its last axis.
    sides = []
    for low, high in ((0, 2), (1, 3)):
        end = torch.minimum(boxes1.tensor[:, high, None], boxes2.tensor[:, high])
        start = torch.maximum(boxes1.tensor[:, low, None], boxes2.tensor[:, low])
        sides.append((end - start).clamp_(min=0))
    return sides[0] * sides[1]


def pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Intersection over union of every pair: (N, M) in 0..1; 0 for boxes that do not overlap or are empty."""
    inter = pairwise_intersection(boxes1, boxes2)
    union = boxes1.area()[:, None] + boxes2.area() - inter
    return _ratio_or_zero(inter, union)


def pairwise_ioa(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Intersection over the area of ``boxes2`` for every pair: (N, M) in 0..1."""
    inter = pairwise_intersection(boxes1, boxes2)
    return _ratio_or_zero(inter, boxes2.area()[None])


def matched_pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """IoU of box i with box i: (N,)."""
    assert len(boxes1) == len(boxes2), f"box i goes with box i, but there are {len(boxes1)} and {len(boxes2)}"
    a, b = boxes1.tensor, boxes2.tensor
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    inter = sides[:, 0] * sides[:, 1]
    return inter / (boxes1.area() + boxes2.area() - inter)


def pairwise_point_box_distance(points: Tensor, boxes: Boxes) -> Tensor:
    """Signed distance of each point to the four sides of each box; all positive means inside.

    Args:
        points: (N, 2) as (x, y), pixels.
        boxes: M boxes.
    Returns:
        (N, M, 4): to the left, top, right and bottom side.
    """
    corner0, corner1 = boxes.tensor[None, :, :2], boxes.tensor[None, :, 2:]
    point = points[:, None]
    return torch.cat((point - corner0, corner1 - point), dim=2)


def _ratio_or_zero(inter: Tensor, base: Tensor) -> Tensor:
    # 0/0 of empty boxes must not become nan, and a negative base (inverted box) must not give -0.
    return torch.where(inter > 0, inter / base, inter.new_zeros(()))
