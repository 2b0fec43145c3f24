"""Instance masks in their three forms: bitmaps of the whole image, polygons, and small maps inside a box.

Training turns the first two into box-sized targets (``crop_and_resize``); inference turns the third into
bitmaps. Polygons are rasterised by pycocotools, so training targets and COCO evaluation agree on what a
polygon covers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor, device
from torchvision.ops import roi_align

from detectron2.structures.boxes import Boxes

# Mask pixels that are turned into floats at a time on the CPU: 16 MB.
_CPU_PIXELS_AT_ONCE = 4 * 1024 * 1024


def polygon_area(x: np.ndarray, y: np.ndarray) -> float:
    """Area of one simple polygon with the corners (x[i], y[i]), square pixels (shoelace formula)."""
    return 0.5 * np.abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))


def polygons_to_bitmask(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """The union of the polygons of one object as a bitmap.

    Args:
        polygons: each (x0, y0, x1, y1, ...) in pixels, at least three corners. No polygons give an empty
            mask.
    Returns:
        (height, width) bool.
    """
    if len(polygons) == 0:
        return np.zeros((height, width), dtype=bool)
    encoded = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return coco_mask.decode(encoded).astype(bool)


def rasterize_polygons_within_box(polygons: list[np.ndarray], box: np.ndarray, mask_size: int) -> Tensor:
    """What the polygons of one object cover inside a box, on a square grid over that box.

    Args:
        polygons: each (x0, y0, x1, y1, ...) in image pixels; not changed.
        box: (4,) float32, XYXY pixels; sides below 0.1 pixel count as 0.1.
        mask_size: cells along each side of the result.
    Returns:
        (mask_size, mask_size) bool.
    """
    return torch.from_numpy(_rasterize_in_boxes([polygons], np.asarray(box)[None], mask_size)[0])


class BitMasks:
    """N objects as bitmaps of the whole image.

    Attributes:
        tensor: (N, H, W) bool.
        image_size: (H, W).
    """

    def __init__(self, tensor: Any) -> None:
        """
        Args:
            tensor: (N, H, W) tensor, array or nested list; everything that is not 0 belongs to the object.
        """
        if isinstance(tensor, Tensor):
            bits = tensor.to(torch.bool)
        else:
            bits = torch.as_tensor(tensor, dtype=torch.bool, device=torch.device("cpu"))
        assert bits.dim() == 3, f"BitMasks wants shape (N, H, W), got {tuple(bits.shape)}"
        self.image_size = bits.shape[1:]
        self.tensor = bits

    def to(self, *args: Any, **kwargs: Any) -> BitMasks:
        return BitMasks(self.tensor.to(*args, **kwargs))

    @property
    def device(self) -> device:
        return self.tensor.device

    def __getitem__(self, item: int | slice | Tensor) -> BitMasks:
        """Index, slice, bool mask (N,) or long indices; always BitMasks, one mask for an integer."""
        picked = self.tensor[item]
        if isinstance(item, int):
            picked = picked[None]
        assert picked.dim() == 3, f"indexing BitMasks with {item!r} does not select whole masks"
        return BitMasks(picked)

    def __iter__(self) -> Iterator[Tensor]:
        """Masks one by one, each (H, W)."""
        return iter(self.tensor)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __repr__(self) -> str:
        return f"BitMasks(num_instances={len(self)})"

    def nonempty(self) -> Tensor:
        """(N,) bool: at least one pixel is set."""
        return _any(self.tensor.flatten(1), dim=1)

    @staticmethod
    def from_polygon_masks(
        polygon_masks: PolygonMasks | list[list[np.ndarray]], height: int, width: int
    ) -> BitMasks:
        """Rasterise polygons into an image of the given size."""
        objects = polygon_masks.polygons if isinstance(polygon_masks, PolygonMasks) else polygon_masks
        bits = np.zeros((len(objects), height, width), dtype=bool)
        for row, polygons in zip(bits, objects):
            row[:] = polygons_to_bitmask(polygons, height, width)
        return BitMasks(torch.from_numpy(bits))

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """Mask i inside box i, as training target of a mask head.

        Args:
            boxes: (N, 4) XYXY pixels.
            mask_size: cells along each side.
        Returns:
            (N, mask_size, mask_size) bool: a cell is set when at least half of it is covered. The cells are
            averages over the box (ROIAlign), so the result differs a little from the one of PolygonMasks.
        """
        assert len(boxes) == len(self), f"mask i goes with box i, but there are {len(self)} and {len(boxes)}"
        boxes = boxes.to(dtype=torch.float32)
        at_once = max(len(self), 1)
        if self.device.type == "cpu":
            # The masks as floats are by far the largest thing here; pieces that fit the cache are 3x faster.
            at_once = max(1, _CPU_PIXELS_AT_ONCE // max(1, self.image_size[0] * self.image_size[1]))
        cells = [
            _covered_cells(masks, part, mask_size)
            for masks, part in zip(self.tensor.split(at_once), boxes.split(at_once))
        ]
        return torch.cat(cells)

    def get_bounding_boxes(self) -> Boxes:
        """The tightest box around each mask; (0, 0, 0, 0) for an empty one."""
        starts, ends = [], []
        if self.tensor.numel() == 0:
            return Boxes(torch.zeros(len(self), 4, device=self.device))
        for dim in (1, 2):
            occupied = _any(self.tensor, dim).to(torch.uint8)  # columns (N, W), then rows (N, H)
            starts.append(occupied.argmax(dim=1))  # argmax of equal values is the first one
            behind_last = occupied.shape[1] - occupied.flip(1).argmax(dim=1)
            ends.append(behind_last * occupied.amax(dim=1))
        return Boxes(torch.stack(starts + ends, dim=1).to(torch.float32))

    @staticmethod
    def cat(bitmasks_list: list[BitMasks]) -> BitMasks:
        """All masks of a list in order; they must have one image size."""
        assert len(bitmasks_list) > 0, "BitMasks.cat: nothing to join"
        assert all(isinstance(m, BitMasks) for m in bitmasks_list), (
            "BitMasks.cat: every entry must be BitMasks"
        )
        return BitMasks(torch.cat([m.tensor for m in bitmasks_list], dim=0))


class PolygonMasks:
    """N objects, each the union of its polygons. Always on the CPU.

    Attributes:
        polygons: N lists of float64 arrays (x0, y0, x1, y1, ...) in pixels.
    """

    def __init__(self, polygons: list[list[Tensor | np.ndarray]]) -> None:
        """
        Args:
            polygons: per object a list of polygons with at least three corners. They are copied.
        Raises:
            ValueError: not a list of lists, or a polygon of an odd count or of less than six numbers.
            TypeError: a number where a polygon is expected (one nesting level too few).
        """
        if not isinstance(polygons, list):
            raise ValueError(
                f"PolygonMasks wants a list with one list of polygons per object, not {type(polygons)}"
            )
        self.polygons: list[list[np.ndarray]] = [
            _checked_polygons(index, of_object) for index, of_object in enumerate(polygons)
        ]

    def to(self, *args: Any, **kwargs: Any) -> PolygonMasks:
        """Itself: polygons stay on the CPU."""
        return self

    @property
    def device(self) -> device:
        return torch.device("cpu")

    def get_bounding_boxes(self) -> Boxes:
        """A box around the corners of each object; the far corner is at least (0, 0).

        An object without polygons has (inf, inf, 0, 0), which Boxes.nonempty drops.
        """
        boxes = torch.zeros(len(self), 4)
        boxes[:, :2] = float("inf")
        for box, of_object in zip(boxes, self.polygons):
            if of_object:
                corners = torch.from_numpy(np.concatenate(of_object).reshape(-1, 2)).to(torch.float32)
                box[:2] = corners.amin(dim=0)
                box[2:] = corners.amax(dim=0).clamp(min=0)
        return Boxes(boxes)

    def nonempty(self) -> Tensor:
        """(N,) bool: the object has a polygon."""
        return torch.tensor([len(of_object) > 0 for of_object in self.polygons], dtype=torch.bool)

    def __getitem__(self, item: int | slice | list[int] | Tensor) -> PolygonMasks:
        """Index, slice, list of indices, bool mask (N,) or long indices; always PolygonMasks."""
        if isinstance(item, int):
            chosen = [self.polygons[item]]
        elif isinstance(item, slice):
            chosen = self.polygons[item]
        else:
            if isinstance(item, (Tensor, np.ndarray)):
                item = _indices_of(torch.as_tensor(item))
            chosen = [self.polygons[i] for i in item]
        same = PolygonMasks([])
        same.polygons = list(chosen)  # checked already
        return same

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        """The polygons of one object after the other."""
        return iter(self.polygons)

    def __len__(self) -> int:
        return len(self.polygons)

    def __repr__(self) -> str:
        return f"PolygonMasks(num_instances={len(self)})"

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """Object i inside box i, as training target of a mask head.

        Args:
            boxes: (N, 4) XYXY pixels.
            mask_size: cells along each side.
        Returns:
            (N, mask_size, mask_size) bool, on the device of ``boxes``.
        """
        assert len(boxes) == len(self), (
            f"object i goes with box i, but there are {len(self)} and {len(boxes)}"
        )
        if len(self) == 0:
            return torch.empty(0, mask_size, mask_size, dtype=torch.bool, device=boxes.device)
        cells = _rasterize_in_boxes(self.polygons, boxes.detach().to("cpu").numpy(), mask_size)
        return torch.from_numpy(cells).to(device=boxes.device)

    def area(self) -> Tensor:
        """(N,) square pixels: the sum over the polygons of an object, overlaps counted twice."""
        return torch.tensor([sum(polygon_area(p[0::2], p[1::2]) for p in one) for one in self.polygons])

    @staticmethod
    def cat(polymasks_list: list[PolygonMasks]) -> PolygonMasks:
        """All objects of a list in order."""
        assert len(polymasks_list) > 0, "PolygonMasks.cat: nothing to join"
        assert all(isinstance(m, PolygonMasks) for m in polymasks_list), (
            "PolygonMasks.cat: wrong type in the list"
        )
        joined = PolygonMasks([])
        joined.polygons = list(itertools.chain.from_iterable(m.polygons for m in polymasks_list))
        return joined


class ROIMasks:
    """N objects as small soft masks, each meant to be stretched over its own box.

    Attributes:
        tensor: (N, M, M) float, probabilities.
    """

    def __init__(self, tensor: Tensor) -> None:
        if tensor.dim() != 3:
            raise ValueError(f"ROIMasks wants shape (N, M, M), got {tuple(tensor.shape)}")
        self.tensor = tensor

    def to(self, device: torch.device | str) -> ROIMasks:
        return ROIMasks(self.tensor.to(device))

    @property
    def device(self) -> device:
        return self.tensor.device

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __getitem__(self, item: slice | Tensor) -> ROIMasks:
        """Slice, bool mask (N,) or long indices."""
        return ROIMasks(self.tensor[item])

    def __repr__(self) -> str:
        return f"ROIMasks(num_instances={len(self)})"

    def to_bitmasks(self, boxes: Boxes | Tensor, height: int, width: int, threshold: float = 0.5) -> BitMasks:
        """Stretch mask i over box i in an image of the given size; see ``paste_masks_in_image``."""
        from detectron2.layers.mask_ops import paste_masks_in_image  # layers build on structures

        return BitMasks(paste_masks_in_image(self.tensor, boxes, (height, width), threshold=threshold))


def _covered_cells(masks: Tensor, boxes: Tensor, mask_size: int) -> Tensor:
    rows = torch.arange(len(boxes), dtype=torch.float32, device=boxes.device)
    rois = torch.cat((rows[:, None], boxes), dim=1)
    coverage = roi_align(masks[:, None].to(torch.float32), rois, (mask_size, mask_size), aligned=True)
    return coverage[:, 0] >= 0.5


def _any(bits: Tensor, dim: int) -> Tensor:
    """bits.any(dim): a maximum over bytes is about ten times as fast on the CPU."""
    if bits.shape[dim] == 0:
        return bits.any(dim=dim)
    return bits.view(torch.uint8).amax(dim=dim).view(torch.bool)


def _rasterize_in_boxes(objects: list[list[np.ndarray]], boxes: np.ndarray, mask_size: int) -> np.ndarray:
    """(N, mask_size, mask_size) bool: what the polygons of object i cover inside box i."""
    corners = boxes[:, :2].astype(np.float64)
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0.1, dtype=np.float32)
    # In float32, as the boxes are: both axes of a square box then get one and the same factor.
    cells_per_pixel = (np.float32(mask_size) / sides).astype(np.float64)
    cells = np.zeros((len(objects), mask_size, mask_size), dtype=bool)
    for of_object, corner, factor, out in zip(objects, corners, cells_per_pixel, cells):
        on_grid = [((p.reshape(-1, 2) - corner) * factor).ravel() for p in of_object]
        out[:] = polygons_to_bitmask(on_grid, mask_size, mask_size)
    return cells


def _checked_polygons(index: int, of_object: Any) -> list[np.ndarray]:
    if not isinstance(of_object, (list, tuple)):
        raise ValueError(f"PolygonMasks: object {index} is not a list of polygons but {type(of_object)}")
    arrays = []
    for polygon in of_object:
        if isinstance(polygon, Tensor):
            polygon = polygon.detach().cpu().numpy()
        if not isinstance(polygon, (np.ndarray, Sequence)):
            raise TypeError(
                f"PolygonMasks: object {index} has {polygon!r} where a polygon [x0, y0, x1, y1, ...] is "
                "expected; an object is a list of polygons"
            )
        array = np.array(polygon, dtype=np.float64)  # always a copy
        if array.ndim != 1 or len(array) % 2 != 0 or len(array) < 6:
            raise ValueError(
                f"PolygonMasks: object {index} has a polygon of shape {array.shape}; needed are x and y "
                "of at least three corners in one flat list"
            )
        arrays.append(array)
    return arrays


def _indices_of(item: Tensor) -> list[int]:
    assert item.dim() == 1, f"PolygonMasks can be indexed by 1-d tensors, not by shape {tuple(item.shape)}"
    if item.dtype == torch.bool:
        item = item.nonzero()[:, 0]
    elif item.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"PolygonMasks cannot be indexed by {item.dtype}; use bool, int32 or int64")
    return item.tolist()
