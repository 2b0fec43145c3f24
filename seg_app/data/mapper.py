"""A record {"file_name", "sem_seg_file_name"} -> what the model takes: image, and in training class ids per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from d2_frozen.caching import SLOT, FeatureCache
from d2_frozen.data.cached_mapper import augment
from d2_frozen.data.label_maps import LabelMapError, read_label_map, resizable
from d2_frozen.data.label_values import LABEL_VALUES, values_of
from d2_frozen.data.reading import channels_first
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from seg_app.data.colours import ColorJitter

# Of the label maps that augmentations see: they are uint8, whatever the data's ids and ignore label are.
_IGNORED = 255


class SegmentationMapper:
    """Reads, augments, converts; in training, images for what the augmentation keeps, and while ``cache`` is set, where
    their features are not in it.

    Args:
        is_train: labels are read too.
        augmentations: in the order in which they run; label maps are resized by nearest neighbour.
        image_format: as Detectron2's ``read_image`` has it.
        ignore_value: what ignored pixels are for the model; the data's own number may be another one.
        num_classes: larger ids are an error here, where DATASETS.SKIP_BAD can draw another image; None: not looked at.
        fast_reading: INPUT.FAST_READING, for training.
    """

    cache: FeatureCache | None = None

    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation],
        image_format: str = "RGB",
        ignore_value: int = 255,
        fast_reading: bool = False,
        num_classes: int | None = None,
    ) -> None:
        self.num_classes = num_classes
        self.fast_reading = fast_reading
        self.is_train = is_train
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.ignore_value = ignore_value

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> SegmentationMapper:
        return cls(
            is_train,
            augmentations=build_augmentations(cfg, is_train),
            image_format=cfg.INPUT.FORMAT,
            ignore_value=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            fast_reading=cfg.INPUT.FAST_READING,
            num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
            if cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES > 0
            else None,
        )

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """
        Returns:
            The record with "height", "width" of the file, "image" (3, h, w) uint8, in training "sem_seg" (h, w) int64
            and its values (LABEL_VALUES).
        Raises:
            LabelMapError: image and label map differ in size, or the latter holds no ids, or ids that are no classes.
        """
        record = dict(record)
        if self.is_train:
            return self._drawn_first(record)
        inputs = T.AugInput(self._image(record))
        self.augmentations(inputs)
        record["image"] = torch.from_numpy(channels_first(inputs.image))
        return record

    def _drawn_first(self, record: dict[str, Any]) -> dict[str, Any]:
        """The augmentation is drawn from the size of the label map; then the image is read as far as it is needed."""
        labels, class_of = self._labels(record)

        def read() -> np.ndarray:
            image = self._image(record)
            _check_sizes(record, labels, image)
            return image

        height, width = labels.shape
        path = record["file_name"]
        done = augment(
            self.cache,
            self.augmentations,
            path,
            (height, width),
            read,
            labels,
            self.image_format,
            self.fast_reading,
        )
        record.setdefault("height", height)
        record.setdefault("width", width)
        record["image"] = done.image
        if done.slot is not None:
            record[SLOT] = done.slot
        _add_labels(record, done.sem_seg, class_of)
        return record

    def _image(self, record: dict[str, Any]) -> np.ndarray:
        image = detection_utils.read_image(record["file_name"], format=self.image_format)
        detection_utils.check_image_size(record, image)
        return image

    def _labels(self, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """(H, W) numbers of the classes of this image, and the class id for each number, int64."""
        path = record["sem_seg_file_name"]
        ignore_label = record.get("ignore_label", 255)
        labels = read_label_map(path, record.get("label_values"), ignore_label)
        present = np.array([value for value in values_of(labels) if value != ignore_label], dtype=np.int64)
        self._check_ids(path, present)
        # Numbers 0, 1, ... without 255, which stands for ignored.
        numbers = np.arange(len(present)) + (np.arange(len(present)) >= _IGNORED)
        class_of = np.full(max(_IGNORED, len(present)) + 1, self.ignore_value, dtype=np.int64)
        class_of[numbers] = present
        number_of = np.full(int(labels.max(initial=0)) + 1, _IGNORED, dtype=np.int64)
        number_of[present] = numbers
        return np.take(resizable(number_of), labels), class_of

    def _check_ids(self, path: str, present: np.ndarray) -> None:
        if self.num_classes is None:
            return
        wrong = present[(present >= self.num_classes) & (present != self.ignore_value)]
        if len(wrong):
            raise LabelMapError(
                "label value out of range",
                f"{path} has {', '.join(map(str, wrong[:5]))}; the {self.num_classes} classes are 0 to "
                f"{self.num_classes - 1}",
            )


def _add_labels(record: dict[str, Any], numbers: np.ndarray, class_of: np.ndarray) -> None:
    """Labels of augmented numbers, and which of them there are."""
    numbers = numbers if numbers.dtype == np.uint8 else numbers.astype(np.int64)
    record["sem_seg"] = torch.from_numpy(np.take(class_of, numbers))
    record[LABEL_VALUES] = np.unique(class_of[values_of(numbers)]).tolist()


def _check_sizes(record: dict[str, Any], labels: np.ndarray, image: np.ndarray) -> None:
    if labels.shape != image.shape[:2]:
        raise LabelMapError(
            "label map and image differ in size",
            f"{record['sem_seg_file_name']} is {labels.shape[1]}x{labels.shape[0]}, "
            f"{record['file_name']} is {image.shape[1]}x{image.shape[0]}",
        )


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """By Detectron2's keys INPUT.MIN_SIZE_*, MAX_SIZE_*, CROP, RANDOM_FLIP and this app's.

    Raises:
        ValueError: values out of range, or another augmentation than this task has.
    """
    settings = cfg.INPUT
    if settings.AUGMENTATION != "resize_shortest_edge":
        raise ValueError(
            f"INPUT.AUGMENTATION is {settings.AUGMENTATION!r}; segmentation has resize_shortest_edge only. Random "
            "scale and crop are INPUT.MIN_SIZE_TRAIN and INPUT.CROP."
        )
    if not is_train:
        return [ResizeShortEdge(settings.MIN_SIZE_TEST, settings.MAX_SIZE_TEST, "choice")]
    augmentations: list[T.Augmentation] = [
        ResizeShortEdge(settings.MIN_SIZE_TRAIN, settings.MAX_SIZE_TRAIN, settings.MIN_SIZE_TRAIN_SAMPLING)
    ]
    if settings.CROP.ENABLED:
        share = settings.CROP.SINGLE_CATEGORY_MAX_AREA
        if not 0 < share <= 1:
            raise ValueError(
                f"INPUT.CROP.SINGLE_CATEGORY_MAX_AREA is {share}; it is a share above 0, up to 1."
            )
        if min(settings.CROP.SIZE) <= 0:
            raise ValueError(f"INPUT.CROP.SIZE is {list(settings.CROP.SIZE)}; height and width are above 0.")
        augmentations.append(
            T.RandomCrop_CategoryAreaConstraint(settings.CROP.TYPE, settings.CROP.SIZE, share, _IGNORED)
        )
    if settings.COLOR_AUG_SSD:
        augmentations.append(ColorJitter(settings.FORMAT))
    flip = settings.RANDOM_FLIP
    if flip not in ("none", "horizontal", "vertical"):
        raise ValueError(f"INPUT.RANDOM_FLIP is {flip!r}; choose none, horizontal or vertical.")
    if flip != "none":
        augmentations.append(T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical"))
    return augmentations


class ResizeShortEdge(T.ResizeShortestEdge):
    """Detectron2's, for sides of any ratio: where it would leave no pixel of the short side, one stays."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        resize = super().get_transform(image)
        if isinstance(resize, T.ResizeTransform) and min(resize.new_h, resize.new_w) < 1:
            return T.ResizeTransform(
                resize.h, resize.w, max(1, resize.new_h), max(1, resize.new_w), resize.interp
            )
        return resize
