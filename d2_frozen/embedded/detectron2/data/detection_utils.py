"""How does one dict of a dataset become an image and the labels a detector trains on?

Boxes are absolute pixels, image sizes (h, w), images (H, W, C) arrays until the mapper makes tensors of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from PIL import Image, UnidentifiedImageError

from detectron2._outside import outside_subset
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks, polygons_to_bitmask
from detectron2.structures.keypoints import Keypoints
from detectron2.utils.file_io import PathManager

from . import transforms as T
from .catalog import MetadataCatalog

__all__ = [
    "SizeMismatchError",
    "annotations_to_instances",
    "build_augmentation",
    "build_transform_gen",
    "build_transform_gens",
    "check_image_size",
    "check_metadata_consistency",
    "convert_PIL_to_numpy",
    "convert_image_to_rgb",
    "create_keypoint_hflip_indices",
    "filter_empty_instances",
    "gen_crop_transform_with_instance",
    "read_image",
    "transform_instance_annotations",
    "transform_keypoint_annotations",
]

logger = logging.getLogger(__name__)

_OUTSIDE = (
    "annotations_to_instances_rotated",
    "get_fed_loss_cls_weights",
    "transform_proposals",
)
__getattr__ = outside_subset(__name__, _OUTSIDE)


class SizeMismatchError(ValueError):
    """An image on disk is not as large as its dataset says."""


# ------------------------------------------------------------------------------------------------ images

# Analogue YUV of ITU-R BT.601; rows give Y, U, V for full-range R, G, B in 0..1.
_YUV_FROM_RGB = np.array([[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]])
_RGB_FROM_YUV = np.array([[1.0, 0.0, 1.13983], [1.0, -0.39465, -0.58060], [1.0, 2.03211, 0.0]])

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(file_name: str, format: str | None = None) -> np.ndarray:
    """Read an image file upright, i.e. turned as its EXIF tag says.

    Args:
        file_name: anything that PathManager can open.
        format: "RGB", "BGR", "L", any other PIL mode, "YUV-BT.601", or None for what the file has.
    Returns:
        (H, W, C) uint8 in 0..255, with C=1 for "L"; (H, W) for a grey file with format None; float64 with
        Y in 0..1 for "YUV-BT.601".
    Raises:
        FileNotFoundError: no such file.
        OSError: the file is no image or is damaged; names the file.
    """
    with PathManager.open(file_name, "rb") as stream:
        try:
            with Image.open(stream) as image:
                return convert_PIL_to_numpy(_upright(image), format)
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as err:
            kind = UnidentifiedImageError if isinstance(err, UnidentifiedImageError) else OSError
            raise kind(f"cannot read the image {file_name}: {type(err).__name__}: {err}") from err


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception as err:  # PIL raises many kinds on malformed EXIF blocks; the pixels may still be fine
        logger.debug("ignoring an unreadable EXIF block: %s", err)
        return image
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def convert_PIL_to_numpy(image: Image.Image, format: str | None) -> np.ndarray:
    """A PIL image as an array in one of the formats of :func:`read_image`."""
    if format is None:
        return np.asarray(image)
    mode = "RGB" if format in ("BGR", "YUV-BT.601") else format
    array = np.asarray(image.convert(mode))
    if format == "L":
        return array[:, :, np.newaxis]
    if format == "BGR":
        return array[:, :, ::-1]
    if format == "YUV-BT.601":
        return array / 255.0 @ _YUV_FROM_RGB.T
    return array


def convert_image_to_rgb(image: np.ndarray | torch.Tensor, format: str) -> np.ndarray:
    """The inverse of :func:`convert_PIL_to_numpy`: (H, W, C) in ``format`` -> (H, W, 3) RGB in 0..255.

    uint8, but float64 for "YUV-BT.601". Of "BGR" with further channels, the first three.
    """
    array = image.cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if format == "YUV-BT.601":
        return array @ _RGB_FROM_YUV.T * 255.0
    if format == "BGR":
        return array[:, :, [2, 1, 0]]
    if format == "L":
        return np.asarray(Image.fromarray(array[:, :, 0].astype(np.uint8)).convert("RGB"))
    array = array.astype(np.uint8)
    return np.asarray(
        Image.fromarray(array) if format == "RGB" else Image.fromarray(array, mode=format).convert("RGB")
    )


def check_image_size(dataset_dict: dict[str, Any], image: np.ndarray) -> None:
    """Compare the image with the "width" and "height" of its dict, and fill these in where they are missing.

    Raises:
        SizeMismatchError: naming the file and both sizes.
    """
    height, width = image.shape[:2]
    promised = (dataset_dict.setdefault("height", height), dataset_dict.setdefault("width", width))
    if promised != (height, width):
        which = f" {dataset_dict['file_name']}" if "file_name" in dataset_dict else ""
        raise SizeMismatchError(
            f"the image{which} is {width}x{height} (width x height), but its dataset says "
            f"{promised[1]}x{promised[0]}. Correct width/height in the annotations; "
            "if they are the size before an EXIF rotation, swap them."
        )


# ------------------------------------------------------------------------------------------------ annotations


def transform_instance_annotations(
    annotation: dict[str, Any],
    transforms: T.Transform | Sequence[T.Transform],
    image_size: tuple[int, int],
    *,
    keypoint_hflip_indices: np.ndarray | None = None,
) -> dict[str, Any]:
    """Move the box, the mask and the keypoints of one annotation along with its image, in place.

    Args:
        annotation: "bbox" with "bbox_mode", maybe "segmentation": polygons [[x0, y0, x1, y1, ...],
            ...] or an RLE, maybe "keypoints".
        transforms: what was done to the image.
        image_size: (h, w) after the transforms; the box is clipped to it.
        keypoint_hflip_indices: see :func:`transform_keypoint_annotations`.
    Returns:
        The same dict: box XYXY_ABS as (4,) array; polygons as flat arrays; an RLE has become an (h, w)
            bitmask; keypoints (K, 3).
    """
    if isinstance(transforms, tuple | list):
        transforms = T.TransformList(transforms)
    height, width = image_size
    box = np.array([BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)])
    annotation["bbox"] = np.minimum(transforms.apply_box(box)[0].clip(min=0), [width, height, width, height])
    annotation["bbox_mode"] = BoxMode.XYXY_ABS

    if "segmentation" in annotation:
        annotation["segmentation"] = _transform_segmentation(
            annotation["segmentation"], transforms, image_size
        )
    if "keypoints" in annotation:
        annotation["keypoints"] = transform_keypoint_annotations(
            annotation["keypoints"], transforms, image_size, keypoint_hflip_indices
        )
    return annotation


def _transform_segmentation(segmentation: Any, transforms: T.Transform, image_size: tuple[int, int]) -> Any:
    if isinstance(segmentation, list):
        corners = [np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation]
        # Some transforms work in place: hand them copies.
        return [moved.reshape(-1) for moved in transforms.apply_polygons([c.copy() for c in corners])]
    if isinstance(segmentation, dict):
        mask = transforms.apply_segmentation(mask_util.decode(segmentation))
        assert mask.shape[:2] == tuple(image_size), (
            f"the transformed mask is {mask.shape[:2]}, the transformed image {tuple(image_size)} (h, w)"
        )
        return mask
    raise ValueError(
        f"a segmentation of type {type(segmentation).__name__} cannot be transformed. Use polygons "
        "[[x0, y0, x1, y1, ...], ...] or a COCO RLE dict with 'size' and 'counts'."
    )


def transform_keypoint_annotations(
    keypoints: Any,
    transforms: T.Transform,
    image_size: tuple[int, int],
    keypoint_hflip_indices: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """Move the keypoints of one object along with its image.

    Args:
        keypoints: K times x, y, visibility (0 not labelled, 1 hidden, 2 visible), flat or (K, 3).
        transforms: what was done to the image.
        image_size: (h, w) after the transforms; a keypoint that has left the image is not labelled any more.
        keypoint_hflip_indices: for mirrored images, which keypoint takes the place of each one, since a left
            eye becomes a right one: :func:`create_keypoint_hflip_indices`.
    Returns:
        (K, 3) float64, zeros for what is not labelled.
    Raises:
        ValueError: the image is mirrored, and the indices are missing or are not K.
    """
    points = np.array(keypoints, dtype=np.float64).reshape(-1, 3)
    position = transforms.apply_coords(points[:, :2].copy())
    height, width = image_size
    outside = ((position < 0) | (position > [width, height])).any(axis=1)
    points[:, :2] = position
    points[outside, 2] = 0
    # Mirrored twice is not mirrored.
    parts = transforms.transforms if isinstance(transforms, T.TransformList) else [transforms]
    if sum(isinstance(part, T.HFlipTransform) for part in parts) % 2:
        if keypoint_hflip_indices is None:
            raise ValueError(
                "the image is mirrored, but it is not known which keypoints change places: give "
                "keypoint_hflip_indices=create_keypoint_hflip_indices(dataset_names)."
            )
        order = np.asarray(keypoint_hflip_indices, dtype=np.int64)
        if len(order) != len(points):
            raise ValueError(
                f"the object has {len(points)} keypoints, its dataset's metadata names {len(order)}."
            )
        points = points[order]
    points[points[:, 2] == 0] = 0
    return points


def create_keypoint_hflip_indices(dataset_names: str | Sequence[str]) -> list[int]:
    """For each keypoint, the index of the one that takes its place when the image is mirrored.

    Args:
        dataset_names: with the metadata "keypoint_names" and "keypoint_flip_map", pairs of names.
    Raises:
        AttributeError: a dataset has no such metadata.
        ValueError: two datasets differ.
    """
    dataset_names = [dataset_names] if isinstance(dataset_names, str) else list(dataset_names)
    for key in ("keypoint_names", "keypoint_flip_map"):
        check_metadata_consistency(key, dataset_names)
    metadata = MetadataCatalog.get(dataset_names[0])
    partner = {a: b for pair in metadata.keypoint_flip_map for a, b in (pair, reversed(pair))}
    names = list(metadata.keypoint_names)
    return [names.index(partner.get(name, name)) for name in names]


def annotations_to_instances(
    annos: list[dict[str, Any]], image_size: tuple[int, int], mask_format: str = "polygon"
) -> Instances:
    """The annotations of one image, as models take them.

    Args:
        annos: each with "bbox", "bbox_mode", "category_id", maybe "segmentation", "keypoints".
        image_size: (h, w) of the image they belong to.
        mask_format: "polygon" or "bitmask".
    Returns:
        Instances with gt_boxes, gt_classes (int64), and gt_masks and gt_keypoints where the first annotation
        has a segmentation and keypoints.
    Raises:
        KeyError: some annotations have a segmentation, or keypoints, and some have none.
        ValueError: a segmentation that does not go with ``mask_format``.
    """
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annos]
    instances = Instances(image_size)
    instances.gt_boxes = Boxes(np.stack(boxes) if boxes else np.zeros((0, 4)))
    instances.gt_classes = torch.tensor([int(a["category_id"]) for a in annos], dtype=torch.int64)
    if annos and "segmentation" in annos[0]:
        instances.gt_masks = _gather_masks(annos, image_size, mask_format)
    if annos and "keypoints" in annos[0]:
        instances.gt_keypoints = Keypoints(np.array(_of_each(annos, "keypoints"), dtype=np.float64))
    return instances


def _of_each(annos: list[dict[str, Any]], key: str) -> list[Any]:
    lacking = sum(key not in a for a in annos)
    if lacking:
        raise KeyError(f"{key!r} is missing in {lacking} of the {len(annos)} annotations of this image.")
    return [a[key] for a in annos]


def _gather_masks(
    annos: list[dict[str, Any]], image_size: tuple[int, int], mask_format: str
) -> PolygonMasks | BitMasks:
    segmentations = _of_each(annos, "segmentation")
    if mask_format == "bitmask":
        bitmaps = [_to_bitmap(s, image_size) for s in segmentations]
        return BitMasks(torch.stack([torch.from_numpy(np.array(b, order="C")) for b in bitmaps]))
    if mask_format != "polygon":
        raise AssertionError(f"INPUT.MASK_FORMAT is 'polygon' or 'bitmask', not {mask_format!r}.")
    try:
        return PolygonMasks(segmentations)
    except ValueError as err:
        raise ValueError(
            "an annotation of this image has a mask that is not made of polygons. "
            "Set INPUT.MASK_FORMAT to 'bitmask'."
        ) from err


def _to_bitmap(segmentation: Any, image_size: tuple[int, int]) -> np.ndarray:
    """Polygons, RLE or an array -> (h, w) array of 0 and 1."""
    if isinstance(segmentation, list):
        return polygons_to_bitmask(segmentation, *image_size)
    if isinstance(segmentation, dict):
        return mask_util.decode(segmentation)
    if isinstance(segmentation, np.ndarray):
        if segmentation.ndim != 2:
            raise AssertionError(f"a mask must have two dimensions (h, w), not shape {segmentation.shape}.")
        return segmentation
    raise ValueError(
        f"a segmentation of type {type(segmentation).__name__} is no mask. Use polygons "
        "[[x0, y0, ...], ...], a COCO RLE dict, or an (h, w) array of 0 and 1."
    )


def filter_empty_instances(
    instances: Instances,
    by_box: bool = True,
    by_mask: bool = True,
    box_threshold: float = 1e-5,
    return_mask: bool = False,
) -> Any:
    """Leave out instances without area.

    Args:
        instances: with gt_boxes, maybe gt_masks.
        by_box: drop boxes with a side of at most ``box_threshold`` pixels.
        by_mask: drop masks without a polygon, or without a pixel.
        return_mask: also return which ones were kept.
    Returns:
        The remaining instances; with ``return_mask`` also an (N,) bool tensor.
    """
    if not (by_box or by_mask):
        raise AssertionError("filter_empty_instances: switch on by_box, by_mask or both.")
    kept = torch.ones(len(instances), dtype=torch.bool)
    if by_box:
        kept &= instances.gt_boxes.nonempty(threshold=box_threshold)
    if by_mask and instances.has("gt_masks"):
        kept &= instances.gt_masks.nonempty()
    remaining = instances[kept]
    return (remaining, kept) if return_mask else remaining


# ----------------------------------------------------------------------------------- augmentation


def gen_crop_transform_with_instance(
    crop_size: tuple[int, int], image_size: tuple[int, int], instance: dict[str, Any]
) -> T.CropTransform:
    """A crop at a drawn place that contains the centre of the instance's box.

    Args:
        crop_size, image_size: (h, w) in pixels.
        instance: with "bbox" and "bbox_mode".
    """
    window, image = np.asarray(crop_size, dtype=np.int32), np.asarray(image_size)
    x0, y0, x1, y1 = BoxMode.convert(instance["bbox"], instance["bbox_mode"], BoxMode.XYXY_ABS)
    center = np.array([(y0 + y1) * 0.5, (x0 + x1) * 0.5])  # (y, x)
    if (center > image).any():
        raise AssertionError(
            f"the box {instance['bbox']} has its centre outside the image of {image_size} (h, w)."
        )
    if (window > image).any():
        raise AssertionError(f"a crop of {crop_size} does not fit into an image of {image_size} (h, w).")
    # Bounds of the window's upper left corner, as (y, x).
    lowest = np.maximum(np.floor(center).astype(np.int32) - window, 0)
    highest = np.minimum(np.ceil(center).astype(np.int32), image - window)
    lowest = np.minimum(lowest, highest)
    top = np.random.randint(lowest[0], highest[0] + 1)
    left = np.random.randint(lowest[1], highest[1] + 1)
    return T.CropTransform(left, top, int(window[1]), int(window[0]))


def build_augmentation(cfg: Any, is_train: bool) -> list[T.Augmentation]:
    """Resizing, and in training flipping, as INPUT.MIN_SIZE_*, MAX_SIZE_* and RANDOM_FLIP say."""
    if not is_train:
        return [T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")]
    style = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    augmentations: list[T.Augmentation] = [
        T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, style)
    ]
    flip = cfg.INPUT.RANDOM_FLIP
    if flip not in ("none", "horizontal", "vertical"):
        raise ValueError(f"INPUT.RANDOM_FLIP is 'none', 'horizontal' or 'vertical', not {flip!r}.")
    if flip != "none":
        augmentations.append(T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical"))
    return augmentations


build_transform_gen = build_transform_gens = build_augmentation  # names in older Detectron2 projects


def check_metadata_consistency(key: str, dataset_names: Sequence[str]) -> None:
    """All datasets must have the same metadata ``key``, e.g. the same class names.

    Raises:
        AttributeError: one of them has none.
        ValueError: two of them differ; names both.
    """
    if not dataset_names:
        return
    first = dataset_names[0]
    expected = getattr(MetadataCatalog.get(first), key)
    for name in dataset_names:
        found = getattr(MetadataCatalog.get(name), key)
        if found != expected:
            raise ValueError(
                f"datasets used together must agree on {key!r}:\n  {first}: {expected}\n  {name}: {found}"
            )
