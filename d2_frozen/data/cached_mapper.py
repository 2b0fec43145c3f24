"""Record -> sample, without reading an image whose features are stored.

The augmentation is drawn first, from the size of the image alone; file and draw are the key of the features. If they
are there, the sample has its labels, moved along as ever, and for "image" zeros of the right size that take no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from fvcore.transforms.transform import PadTransform, TransformList
from torch import Tensor

from d2_frozen.caching import SLOT, FeatureCache, Slot
from d2_frozen.data.draws import remember_generators
from d2_frozen.data.frames import FrameInput, PixelsNeeded, image_size
from d2_frozen.data.label_maps import read_label_map, resizable
from d2_frozen.data.label_values import LABEL_VALUES, values_of
from d2_frozen.data.reading import channels_first, read_augmented
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T


class Augmented(NamedTuple):
    """``image`` (3, h, w) uint8; ``sem_seg`` (h, w) or None; what was done; ``slot`` for the sample, with a cache."""

    image: Tensor
    sem_seg: np.ndarray | None
    transforms: TransformList
    slot: Slot | None


class FrozenDatasetMapper(DatasetMapper):
    """Detectron2's mapper, pixels included; in training they are made for what the augmentation keeps.

    While ``cache`` is set, training samples get a slot, and images are read where needed.

    Beside "sem_seg", training samples have its values (LABEL_VALUES).

    Attributes:
        fast_reading: INPUT.FAST_READING, for training.
        ignore_value: MODEL.SEM_SEG_HEAD.IGNORE_VALUE, with which augmentations pad label maps.
    """

    cache: FeatureCache | None = None
    fast_reading = False
    ignore_value = 255

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """As DatasetMapper; see the top of the file."""
        if not self.is_train:
            return super().__call__(dataset_dict)
        sample = _copied(dataset_dict)
        label_file = sample.pop("sem_seg_file_name", None)
        # Detectron2 takes the brightness of what is no picture of one channel: of a palette's colours, say.
        labels = None if label_file is None else resizable(read_label_map(label_file), self.ignore_value)
        path = sample["file_name"]
        if "height" not in sample or "width" not in sample:
            sample["height"], sample["width"] = image_size(path)

        def read() -> np.ndarray:
            image = detection_utils.read_image(path, format=self.image_format)
            detection_utils.check_image_size(sample, image)
            return image

        size = (sample["height"], sample["width"])
        done = augment(
            self.cache, self.augmentations, path, size, read, labels, self.image_format, self.fast_reading
        )
        sample["image"] = done.image
        if done.slot is not None:
            sample[SLOT] = done.slot
        if done.sem_seg is not None:
            sample["sem_seg"] = torch.as_tensor(done.sem_seg.astype("long"))
            sample[LABEL_VALUES] = values_of(done.sem_seg)
        if "annotations" in sample:
            self._transform_annotations(
                sample, _padding_is_no_object(done.transforms), tuple(done.image.shape[1:])
            )
        return sample


def augment(
    cache: FeatureCache | None,
    augmentations: T.Augmentation,
    path: str,
    image_hw: tuple[int, int],
    read: Callable[[], np.ndarray],
    sem_seg: np.ndarray | None = None,
    image_format: str = "RGB",
    fast_reading: bool = False,
) -> Augmented:
    """Draw an augmentation, look for the features of what comes out, and make the pixels if they are not there.

    Draws and pixels are those of ``augmentations(AugInput(read(), sem_seg=sem_seg))``; with ``fast_reading`` pixels as
    :func:`read_augmented` gives them when it is fast.

    Args:
        path, image_hw: the image file, and its height and width in pixels.
        read: gives its pixels, (h, w, 3) uint8.
        image_format: order of the channels that ``read`` gives.
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
    slot = None
    if cache is not None:
        slot = cache.look_up(path, [list(image_hw), image_format, fast_reading, transforms])
    height, width = inputs.image.shape[:2]
    if cache is not None and slot is not None and slot.place is not None and not cache.wants_pixels:
        return Augmented(placeholder(height, width), inputs.sem_seg, transforms, slot)
    if pixels is None:
        pixels = read_augmented(path, image_format, image_hw, transforms, fast_reading)
    if pixels is None:
        pixels = transforms.apply_image(read())
    if pixels.shape[:2] != (height, width):
        raise ValueError(
            f"the augmentations make {pixels.shape[1]}x{pixels.shape[0]} pixels (width x height) of {path}, where "
            f"{width}x{height} were expected: one of its transforms was made for an image of another size."
        )
    return Augmented(torch.from_numpy(channels_first(pixels)), inputs.sem_seg, transforms, slot)


def _padding_is_no_object(transforms: TransformList) -> TransformList:
    """For masks of objects: what label maps get as padding (255, ignored) would be an object's pixels in them."""
    steps = []
    for step in transforms.transforms:
        if isinstance(step, PadTransform):
            step = copy.copy(step)
            step.seg_pad_value = 0
        steps.append(step)
    return TransformList(steps)


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
