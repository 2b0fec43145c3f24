"""What the losses compare with: label maps in one size, or a mask for every class that occurs.

In: Detectron2's dicts, with "sem_seg" (H, W) class ids of any integer type, or "instances" with gt_classes and
gt_masks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
        _occurring(labels, one, num_classes, ignore)
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
        ValueError: as for :func:`padded_labels`.
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
    present = _occurring(labels, one, num_classes, ignore).to(device, non_blocking=True)
    h, w = labels.shape
    masks = torch.zeros(len(present), *size, dtype=torch.bool, device=device)
    masks[:, :h, :w] = labels.to(device, non_blocking=True) == present[:, None, None]
    return {"labels": present, "masks": masks}


def _of_instances(
    one: dict[str, Any], size: tuple[int, int], num_classes: int, device: torch.device
) -> dict[str, Tensor]:
    instances = one["instances"]
    given = instances.gt_masks
    given = given if isinstance(given, Tensor) else given.tensor  # BitMasks
    labels = instances.gt_classes.long()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
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


def _occurring(labels: Tensor, one: dict[str, Any], num_classes: int, ignore: int) -> Tensor:
    """Class ids that occur, in order, without the ignore label."""
    if labels.numel() == 0:
        return labels.new_zeros(0)
    low, high = (int(x) for x in labels.aminmax())
    if low >= 0 and high < 1 << 16:
        present = torch.bincount(labels.flatten()).nonzero()[:, 0]  # counting is faster than unique()'s sort
    else:
        present = labels.unique()
    present = present[present != ignore]
    wrong = present[(present < 0) | (present >= num_classes)].tolist()
    if wrong:
        raise ValueError(
            f"{_name(one)}: label values {wrong[:5]} are no classes; MODEL.SEM_SEG_HEAD has NUM_CLASSES {num_classes} "
            f"(ids 0..{num_classes - 1}) and IGNORE_VALUE {ignore}."
        )
    return present


def _name(one: dict[str, Any]) -> str:
    return str(one.get("sem_seg_file_name") or one.get("file_name") or "an image without file_name")
