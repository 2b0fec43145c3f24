"""Record -> sample, without reading an image whose features are stored.

The augmentation is drawn first, from the size of the image alone; file and draw are the key of the features. If they
are there, the sample has its labels, moved along as ever, and for "image" zeros of the right size that take no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from fvcore.transforms.transform import TransformList
from torch import Tensor

from d2_frozen.caching import SLOT, FeatureCache, Slot
from d2_frozen.data.draws import remember_generators
from d2_frozen.data.frames import FrameInput, PixelsNeeded, image_size
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T


class Augmented(NamedTuple):
    """``image`` (3, h, w) uint8; ``sem_seg`` (h, w) or None; what was done; ``slot`` for the sample."""

    image: Tensor
    sem_seg: np.ndarray | None
    transforms: TransformList
    slot: Slot


class FrozenDatasetMapper(DatasetMapper):
    """Detectron2's mapper. While ``cache`` is set, training samples get a slot, and images are read where needed."""

    cache: FeatureCache | None = None

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """As DatasetMapper; see the top of the file."""
        if self.cache is None or not self.is_train:
            return super().__call__(dataset_dict)
        sample = _copied(dataset_dict)
        label_file = sample.pop("sem_seg_file_name", None)
        labels = None if label_file is None else detection_utils.read_image(label_file, "L")[:, :, 0]
        path = sample["file_name"]
        if "height" not in sample or "width" not in sample:
            sample["height"], sample["width"] = image_size(path)

        def read() -> np.ndarray:
            image = detection_utils.read_image(path, format=self.image_format)
            detection_utils.check_image_size(sample, image)
            return image

        size = (sample["height"], sample["width"])
        done = augment(self.cache, self.augmentations, path, size, read, labels, self.image_format)
        sample["image"], sample[SLOT] = done.image, done.slot
        if done.sem_seg is not None:
            sample["sem_seg"] = torch.as_tensor(done.sem_seg.astype("long"))
        if "annotations" in sample:
            self._transform_annotations(sample, done.transforms, tuple(done.image.shape[1:]))
        return sample


def augment(
    cache: FeatureCache,
    augmentations: T.Augmentation,
    path: str,
    image_hw: tuple[int, int],
    read: Callable[[], np.ndarray],
    sem_seg: np.ndarray | None = None,
    *about_pixels: Any,
) -> Augmented:
    """Draw an augmentation, look for the features of what comes out, and make the pixels if they are not there.

    Draws and pixels are those of ``augmentations(AugInput(read(), sem_seg=sem_seg))``.

    Args:
        path, image_hw: the image file, and its height and width in pixels.
        read: gives its pixels, (h, w, 3) uint8.
        about_pixels: what else decides how the file becomes pixels, such as the channel order.
    """
    restore = remember_generators()
    inputs: T.AugInput = FrameInput(image_hw, sem_seg)
    try:
        transforms, pixels = augmentations(inputs), None
    except PixelsNeeded:
        restore()
        inputs = T.AugInput(read(), sem_seg=sem_seg)
        transforms = augmentations(inputs)
        pixels = inputs.image
    slot = cache.look_up(path, [list(image_hw), list(about_pixels), transforms])
    height, width = inputs.image.shape[:2]
    if slot.place is not None and not cache.wants_pixels:
        return Augmented(placeholder(height, width), inputs.sem_seg, transforms, slot)
    if pixels is None:
        pixels = transforms.apply_image(read())
        if pixels.shape[:2] != (height, width):
            raise ValueError(
                f"the augmentations make {pixels.shape[1]}x{pixels.shape[0]} pixels (width x height) of {path}, where "
                f"{width}x{height} were expected. One of them is a subclass with another result; set "
                "MODEL.FROZEN.CACHE.DIR to '' to train with it."
            )
    # A copy where needed: flips and channel swaps leave negative strides, which torch does not take.
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return Augmented(image, inputs.sem_seg, transforms, slot)


def _copied(record: dict[str, Any]) -> dict[str, Any]:
    """What the transforms of annotations write to is copied; of COCO's long lists of numbers only the list of lists.

    A deep copy takes longer than all the rest of a sample whose features are stored.
    """
    sample = dict(record)
    if "annotations" in sample:
        sample["annotations"] = [
            {key: _copied_value(value) for key, value in annotation.items()}
            for annotation in sample["annotations"]
        ]
    return sample


def _copied_value(value: Any) -> Any:
    if isinstance(value, list):
        return [one.copy() if isinstance(one, np.ndarray) else one for one in value]
    return value.copy() if isinstance(value, np.ndarray | dict) else value


def placeholder(*hw: int) -> Tensor:
    """(3, height, width) uint8 zeros that take one byte."""
    return torch.zeros((), dtype=torch.uint8).expand(3, *hw)
