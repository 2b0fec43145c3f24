"""What the losses compare with: label maps in one size, or a mask for every class that occurs.

In: Detectron2's dicts, with "sem_seg" (H, W) class ids of any integer type and maybe the values that occur in it
(d2_frozen.data.label_values), or "instances" with gt_classes and gt_masks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from d2_frozen.data.label_values import values_in
from detectron2.structures import PolygonMasks


def padded_labels(
    batch: list[dict[str, Any]], size: tuple[int, int], num_classes: int, ignore: int, device: torch.device
) -> Tensor:
    """(B, H, W) int64 label maps, padded at the right and bottom with the ignore label.

    Raises:
        ValueError: an image without "sem_seg", a label map of another size than its image, a class id out of range.
    """
    rows = []
    for one in batch:
        labels = _labels_of(one)
        _occurring(one, num_classes, ignore)
        h, w = labels.shape
        rows.append(F.pad(labels, (0, size[1] - w, 0, size[0] - h), value=ignore))
    return torch.stack(rows).to(device, non_blocking=True)


def mask_targets(
    batch: list[dict[str, Any]], size: tuple[int, int], num_classes: int, ignore: int, device: torch.device
) -> list[dict[str, Tensor]]:
    """Per image ``labels`` (T,) int64 and ``masks`` (T, H, W) bool, zero in the padding.

    From "sem_seg", a target is a class that occurs; pixels with the ignore label are in none. From "instances", each
    instance is one.

    Raises:
        ValueError: as for :func:`padded_labels`; instances with polygons.
    """
    return [
        _of_instances(one, size, num_classes, device)
        if "instances" in one
        else _of_labels(one, size, num_classes, ignore, device)
        for one in batch
    ]


def _of_labels(
    one: dict[str, Any], size: tuple[int, int], num_classes: int, ignore: int, device: torch.device
) -> dict[str, Tensor]:
    labels = _labels_of(one)
    occurring = torch.tensor(_occurring(one, num_classes, ignore), dtype=torch.int64)
    present = occurring.to(device, non_blocking=True)
    h, w = labels.shape
    masks = torch.zeros(len(present), *size, dtype=torch.bool, device=device)
    masks[:, :h, :w] = labels.to(device, non_blocking=True) == present[:, None, None]
    return {"labels": present, "masks": masks}


def _of_instances(
    one: dict[str, Any], size: tuple[int, int], num_classes: int, device: torch.device
) -> dict[str, Tensor]:
    instances = one["instances"]
    given = instances.gt_masks
    if isinstance(given, PolygonMasks):
        raise ValueError(
            f"{_name(one)}: gt_masks are polygons, but a mask head takes bitmaps. With Detectron2's DatasetMapper, set "
            "INPUT.MASK_FORMAT to bitmask."
        )
    given = given if isinstance(given, Tensor) else given.tensor  # BitMasks
    labels = instances.gt_classes.long()
    # Both together: one wait for the device.
    lowest, highest = torch.stack(labels.aminmax()).tolist() if len(labels) else (0, 0)
    if len(labels) and not 0 <= lowest <= highest < num_classes:
        raise ValueError(
            f"{_name(one)}: instances of classes {sorted(set(labels.tolist()))}, but MODEL.SEM_SEG_HEAD.NUM_CLASSES "
            f"is {num_classes}."
        )
    masks = torch.zeros(len(labels), *size, dtype=torch.bool, device=device)
    masks[:, : given.shape[1], : given.shape[2]] = given.to(device) != 0
    return {"labels": labels.to(device), "masks": masks}


def _labels_of(one: dict[str, Any]) -> Tensor:
    """(h, w) int64 labels of one image, checked against the image's size."""
    if "sem_seg" not in one:
        raise ValueError(
            f"{_name(one)}: training needs labels, but the input has no 'sem_seg' (it has {', '.join(sorted(one))})."
        )
    labels = one["sem_seg"]
    image = tuple(one["image"].shape[-2:])
    if tuple(labels.shape) != image:
        raise ValueError(
            f"{_name(one)}: the label map is of size {tuple(labels.shape)} and the image {image} (height, width); "
            "they must be equal."
        )
    return labels.to(torch.int64)


def _occurring(one: dict[str, Any], num_classes: int, ignore: int) -> list[int]:
    """Class ids that occur in one image, in order, without the ignore label."""
    present = [value for value in values_in(one) if value != ignore]
    wrong = [value for value in present if not 0 <= value < num_classes]
    if wrong:
        raise ValueError(
            f"{_name(one)}: label values {wrong[:5]} are no classes; MODEL.SEM_SEG_HEAD has NUM_CLASSES {num_classes} "
            f"(ids 0..{num_classes - 1}) and IGNORE_VALUE {ignore}."
        )
    return present


def _name(one: dict[str, Any]) -> str:
    return str(one.get("sem_seg_file_name") or one.get("file_name") or "an image without file_name")
