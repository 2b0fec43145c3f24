"""Detection on several sizes and mirrored copies of an image, merged into one answer.

Boxes of all copies are brought back to the original image and go through one NMS; masks of the merged boxes
are then predicted on every copy and averaged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from fvcore.transforms import HFlipTransform, NoOpTransform, Transform
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.config import configurable
from detectron2.structures import Boxes, Instances

from ._lookup import refuse
from .meta_arch.rcnn import GeneralizedRCNN
from .postprocessing import detector_postprocess
from .roi_heads.fast_rcnn import fast_rcnn_inference_single_image

__all__ = ["DatasetMapperTTA", "GeneralizedRCNNWithTTA"]

Sample = dict[str, Any]


class DatasetMapperTTA:
    """Makes the copies: every shortest edge in ``min_sizes``, each also mirrored if ``flip``."""

    @configurable
    def __init__(self, min_sizes: Sequence[int], max_size: int, flip: bool):
        """
        Args:
            min_sizes: lengths of the shortest edge, in pixels.
            max_size: the longest edge never exceeds it, in pixels.
            flip: add a horizontally mirrored copy of each size.
        """
        self.min_sizes = min_sizes
        self.max_size = max_size
        self.flip = flip

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        opts = cfg.TEST.AUG
        return {"min_sizes": opts.MIN_SIZES, "max_size": opts.MAX_SIZE, "flip": opts.FLIP}

    def __call__(self, dataset_dict: Sample) -> list[Sample]:
        """
        Args:
            dataset_dict: "image" (C, H, W), and "height", "width" of the original image.
        Returns:
            one dict per copy, with its "image" and the "transforms" from the original image to it.
        """
        from detectron2.data import transforms as T

        image = dataset_dict["image"].permute(1, 2, 0).numpy()  # (H, W, C)
        original = (dataset_dict["height"], dataset_dict["width"])
        before: Transform = NoOpTransform()
        if image.shape[:2] != original:
            before = T.ResizeTransform(*original, *image.shape[:2])
        copies = []
        for min_size in self.min_sizes:
            resize = T.ResizeShortestEdge(min_size, self.max_size)
            for mirrored in (False, True) if self.flip else (False,):
                steps = [resize, T.RandomFlip(prob=1.0)] if mirrored else [resize]
                changed, transforms = T.apply_augmentations(steps, np.copy(image))
                one = {key: copy.deepcopy(value) for key, value in dataset_dict.items() if key != "image"}
                one["image"] = torch.from_numpy(np.ascontiguousarray(changed.transpose(2, 0, 1)))
                one["transforms"] = before + transforms
                copies.append(one)
        return copies


class GeneralizedRCNNWithTTA(nn.Module):
    """Wraps a GeneralizedRCNN; called like it, in eval mode, and answers in the same form."""

    def __init__(
        self,
        cfg,
        model: nn.Module,
        tta_mapper: Callable[[Sample], list[Sample]] | None = None,
        batch_size: int = 3,
    ):
        """
        Args:
            cfg: for TEST.AUG, and the thresholds of the final NMS.
            model: a GeneralizedRCNN, or one inside DistributedDataParallel.
            tta_mapper: makes the copies of an image. Default: DatasetMapperTTA(cfg).
            batch_size: copies that are run at once.
        Raises:
            TypeError: another kind of model.
            ValueError: the model takes its proposals from files.
        """
        super().__init__()
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if not isinstance(model, GeneralizedRCNN):
            raise TypeError(f"test-time augmentation is for GeneralizedRCNN, not for {type(model).__name__}")
        refuse(cfg.MODEL.KEYPOINT_ON, "MODEL.KEYPOINT_ON: True (keypoint heads)")
        if cfg.MODEL.LOAD_PROPOSALS:
            raise ValueError("test-time augmentation cannot use MODEL.LOAD_PROPOSALS: True")
        self.cfg = cfg.clone()
        self.model = model
        self.tta_mapper = DatasetMapperTTA(cfg) if tta_mapper is None else tta_mapper
        self.batch_size = batch_size

    def __call__(self, batched_inputs: list[Sample]) -> list[Sample]:
        """As GeneralizedRCNN at inference; "image" may be missing if there is a "file_name" to read."""
        return [self._inference_one_image(self._with_image(one)) for one in batched_inputs]

    def _with_image(self, sample: Sample) -> Sample:
        sample = dict(sample)
        if "image" not in sample:
            from detectron2.data.detection_utils import read_image

            image = read_image(sample["file_name"], self.model.input_format)
            sample["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if "height" not in sample and "width" not in sample:
            sample["height"], sample["width"] = sample["image"].shape[1:]
        return sample

    def _inference_one_image(self, sample: Sample) -> Sample:
        size = (sample["height"], sample["width"])
        copies = self.tta_mapper(sample)
        transforms = [one.pop("transforms") for one in copies]
        with self._boxes_only():
            found = self._run(copies, None)
        merged = self._merge(found, transforms, size)
        if self.cfg.MODEL.MASK_ON:
            moved = [
                self._in_copy(merged, one["image"].shape[1:], transform)
                for one, transform in zip(copies, transforms)
            ]
            merged.pred_masks = self._mean_masks(self._run(copies, moved), transforms)
            merged = detector_postprocess(merged, *size)
        return {"instances": merged}

    @contextmanager
    def _boxes_only(self) -> Iterator[None]:
        """Skip the masks of boxes that will be merged away."""
        heads = self.model.roi_heads
        before = getattr(heads, "mask_on", None)
        try:
            if before is not None:
                heads.mask_on = False
            yield
        finally:
            if before is not None:
                heads.mask_on = before

    def _run(self, copies: list[Sample], instances: list[Instances] | None) -> list[Instances]:
        results: list[Instances] = []
        for start in range(0, len(copies), self.batch_size):
            part = slice(start, start + self.batch_size)
            given = None if instances is None else instances[part]
            results += self.model.inference(copies[part], given, do_postprocess=False)
        return results

    def _merge(self, found: list[Instances], transforms: list[Transform], size: tuple[int, int]) -> Instances:
        """Detections of all copies, in the original image, after one NMS."""
        boxes = np.concatenate(
            [
                transform.inverse().apply_box(one.pred_boxes.tensor.cpu().numpy())
                for one, transform in zip(found, transforms)
            ]
        )
        scores = torch.cat([one.scores for one in found])
        classes = torch.cat([one.pred_classes for one in found])
        # One column per class and one for the background, as the box predictor gives them.
        by_class = scores.new_zeros(len(scores), self.cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1)
        by_class[torch.arange(len(scores), device=scores.device), classes] = scores
        merged, _ = fast_rcnn_inference_single_image(
            torch.from_numpy(boxes).to(scores),
            by_class,
            size,
            1e-8,  # the model has applied the real threshold; this one leaves out the zeros
            self.cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            self.cfg.TEST.DETECTIONS_PER_IMAGE,
        )
        return merged

    @staticmethod
    def _in_copy(merged: Instances, size: Sequence[int], transform: Transform) -> Instances:
        boxes = merged.pred_boxes.tensor
        moved = Instances((int(size[0]), int(size[1])))
        moved.pred_boxes = Boxes(torch.from_numpy(transform.apply_box(boxes.cpu().numpy())).to(boxes))
        moved.pred_classes = merged.pred_classes
        moved.scores = merged.scores
        return moved

    @staticmethod
    def _mean_masks(outputs: list[Instances], transforms: list[Transform]) -> torch.Tensor:
        """(N, 1, side, side) mean over the copies, mirrored ones turned back first."""
        masks = []
        for one, transform in zip(outputs, transforms):
            mirrored = any(isinstance(step, HFlipTransform) for step in transform.transforms)
            masks.append(one.pred_masks.flip(dims=[3]) if mirrored else one.pred_masks)
        return torch.stack(masks).mean(dim=0)
