"""How does a dict of a detection dataset become the dict that a model takes?"""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import torch

from detectron2._outside import outside_message
from detectron2.config import configurable

from . import detection_utils as utils
from . import transforms as T

__all__ = ["DatasetMapper"]

logger = logging.getLogger(__name__)


class DatasetMapper:
    """Reads the image, augments it together with its labels, makes tensors of both.

    Args:
        is_train: with False the annotations are left out.
        augmentations: run in this order.
        image_format: as :func:`detection_utils.read_image` takes it, usually INPUT.FORMAT.
        use_instance_mask: keep the masks.
        instance_mask_format: "polygon" or "bitmask".
        recompute_boxes: after the augmentation take the boxes from the masks, which are tighter after a crop.
        use_keypoint: keep the keypoints.
        keypoint_hflip_indices: see :func:`detection_utils.create_keypoint_hflip_indices`.
        precomputed_proposal_topk: a feature of Detectron2 itself; ImportError when used.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: list[T.Augmentation | T.Transform],
        image_format: str,
        use_instance_mask: bool = False,
        use_keypoint: bool = False,
        instance_mask_format: str = "polygon",
        keypoint_hflip_indices: np.ndarray | None = None,
        precomputed_proposal_topk: int | None = None,
        recompute_boxes: bool = False,
    ):
        if precomputed_proposal_topk is not None:
            raise ImportError(outside_message("MODEL.LOAD_PROPOSALS (precomputed proposals)"))
        if recompute_boxes and not use_instance_mask:
            raise AssertionError("recompute_boxes takes boxes from masks: it needs use_instance_mask=True.")
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.use_instance_mask = use_instance_mask
        self.use_keypoint = use_keypoint
        self.instance_mask_format = instance_mask_format
        self.keypoint_hflip_indices = keypoint_hflip_indices
        self.proposal_topk = precomputed_proposal_topk
        self.recompute_boxes = recompute_boxes
        logger.info("%s augmentations: %s", "Training" if is_train else "Inference", augmentations)

    @classmethod
    def from_config(cls, cfg: Any, is_train: bool = True) -> dict[str, Any]:
        """Constructor arguments out of INPUT.* and MODEL.MASK_ON."""
        crop = is_train and cfg.INPUT.CROP.ENABLED
        augmentations = utils.build_augmentation(cfg, is_train)
        if crop:
            augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
        settings = {
            "is_train": is_train,
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "use_instance_mask": cfg.MODEL.MASK_ON,
            "instance_mask_format": cfg.INPUT.MASK_FORMAT,
            "recompute_boxes": crop and cfg.MODEL.MASK_ON,
            "use_keypoint": cfg.MODEL.KEYPOINT_ON,
        }
        if cfg.MODEL.KEYPOINT_ON:
            settings["keypoint_hflip_indices"] = utils.create_keypoint_hflip_indices(cfg.DATASETS.TRAIN)
        if cfg.MODEL.LOAD_PROPOSALS:
            topk = cfg.DATASETS
            settings["precomputed_proposal_topk"] = (
                topk.PRECOMPUTED_PROPOSAL_TOPK_TRAIN if is_train else topk.PRECOMPUTED_PROPOSAL_TOPK_TEST
            )
        return settings

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Map one sample; the given dict stays as it is.

        Args:
            dataset_dict: with "file_name"; maybe "height", "width", "annotations", "sem_seg_file_name".
        Returns:
            A dict with "image", (C, H, W) uint8 in ``image_format``; in training also "instances" where
            there were annotations; "sem_seg", (H, W) int64, where there was a label map; and the other
            keys as they were.
        """
        sample = copy.deepcopy(dataset_dict)
        image = utils.read_image(sample["file_name"], format=self.image_format)
        utils.check_image_size(sample, image)
        label_file = sample.pop("sem_seg_file_name", None)
        labels = None if label_file is None else utils.read_image(label_file, "L")[:, :, 0]

        held = T.AugInput(image, sem_seg=labels)
        transforms = self.augmentations(held)
        # A copy where needed: flips and channel swaps leave negative strides, which torch does not take.
        sample["image"] = torch.as_tensor(np.ascontiguousarray(held.image.transpose(2, 0, 1)))
        if held.sem_seg is not None:
            sample["sem_seg"] = torch.as_tensor(held.sem_seg.astype("long"))

        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            self._transform_annotations(sample, transforms, held.image.shape[:2])
        return sample

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.Transform, image_shape: tuple[int, int]
    ) -> None:
        """Replace "annotations" by "instances": transformed, without crowds and what has left the image.

        Subclasses with other labels override this one.
        """
        used = {"segmentation": self.use_instance_mask, "keypoints": self.use_keypoint}
        moved = [
            utils.transform_instance_annotations(
                {key: value for key, value in annotation.items() if used.get(key, True)},
                transforms,
                image_shape,
                keypoint_hflip_indices=self.keypoint_hflip_indices,
            )
            for annotation in dataset_dict.pop("annotations")
            if annotation.get("iscrowd", 0) == 0
        ]
        instances = utils.annotations_to_instances(moved, image_shape, mask_format=self.instance_mask_format)
        if self.recompute_boxes and instances.has("gt_masks"):
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        dataset_dict["instances"] = utils.filter_empty_instances(instances)
