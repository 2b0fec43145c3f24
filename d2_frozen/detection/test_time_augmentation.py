"""Detection on several sizes and mirrored copies of an image, merged into one answer: TEST.AUG.

In: Detectron2's list of dicts.  Out: its list of {"instances"}, in the pixels of the original image.
Boxes of all copies go through one NMS (or Soft-NMS) per class, in the original image; the masks of what is left are
predicted on every copy and averaged, mirrored ones turned back.

Detectron2's GeneralizedRCNNWithTTA does the same for the short edge. This one adds the sizes of scale_crop, Soft-NMS,
one pass of the backbone per copy instead of two, and no padding but the backbone's own: a batch is one size.
Lin et al., arXiv 2211.02043, Table 5, mark the rows that were tested on several scales, and do not say on which.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2_frozen.data import build_test_loader
from d2_frozen.detection.soft_nms import SoftNMS
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.layers import batched_nms
from detectron2.modeling import GeneralizedRCNN, detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

logger = logging.getLogger(__name__)

Sample = dict[str, Any]


def evaluate_with_tta(
    cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator]
) -> dict[str, Any]:
    """Evaluate on DATASETS.TEST with :class:`FrozenRCNNWithTTA`, from the files' own resolution.

    Args:
        evaluators: one per dataset.
    Returns:
        As DefaultTrainer.test, its keys (task, or dataset where there are several) with the suffix ``_TTA``.
    """
    mapper = DatasetMapper(False, augmentations=[], image_format=cfg.INPUT.FORMAT)
    return evaluate_augmented(cfg, FrozenRCNNWithTTA(cfg, model), mapper, evaluators)


def evaluate_augmented(
    cfg: CfgNode, augmented: nn.Module, mapper: Callable[[dict], dict], evaluators: Sequence[DatasetEvaluator]
) -> dict[str, Any]:
    """The same for a wrapper of any model.

    Args:
        mapper: gives images as they are in the files, so that every copy is resized once: not from an image that was
            resized for the plain test.
    """
    results: dict[str, Any] = {}
    for name, evaluator in zip(cfg.DATASETS.TEST, evaluators, strict=True):
        loader = build_test_loader(cfg, name, mapper=mapper)
        results[name] = inference_on_dataset(augmented, loader, evaluator) or {}
        if comm.is_main_process():
            logger.info("Test-time augmentation on %s:", name)
            print_csv_format(results[name])
    if len(results) == 1:
        (results,) = results.values()
    return {f"{key}_TTA": value for key, value in results.items()}


class FrozenRCNNWithTTA(nn.Module):
    """Wraps a detector; called like it, at inference."""

    def __init__(self, cfg: CfgNode, model: nn.Module, keep_features_bytes: int = 2 << 30):
        """
        Args:
            cfg: for TEST.AUG, TEST.DETECTIONS_PER_IMAGE and the kind of NMS.
            model: FrozenRCNN or another GeneralizedRCNN, or one inside DistributedDataParallel.
            keep_features_bytes: pyramids of an image's copies are kept for its masks up to this much memory; beyond,
                the backbone runs again.
        Raises:
            ValueError: another kind of model, proposals from files, keypoints, or no sizes.
        """
        super().__init__()
        if isinstance(model, DistributedDataParallel):
            model = model.module
        if not isinstance(model, GeneralizedRCNN):
            raise ValueError(
                f"TEST.AUG.ENABLED: True is for R-CNN detectors, the model is {type(model).__name__}."
            )
        if model.proposal_generator is None or cfg.MODEL.KEYPOINT_ON:
            raise ValueError(
                "TEST.AUG.ENABLED: True works neither with proposals from files nor with MODEL.KEYPOINT_ON."
            )
        opts = cfg.TEST.AUG
        if not opts.MIN_SIZES or min(opts.MIN_SIZES) < 1 or opts.MAX_SIZE < 1:
            raise ValueError(
                f"TEST.AUG.MIN_SIZES is {opts.MIN_SIZES}, MAX_SIZE {opts.MAX_SIZE}; need sizes in pixels."
            )
        self.model = model
        self.resizes = resizes_for_test(cfg)
        self.flip = opts.FLIP
        self.keep_features_bytes = keep_features_bytes
        self.nms_threshold = cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST
        self.topk = cfg.TEST.DETECTIONS_PER_IMAGE
        self.soft_nms = SoftNMS.from_config(cfg)
        # What evaluates the wrapper puts it back into the mode it had, and the model with it.
        self.train(model.training)

    @torch.no_grad()
    def forward(self, batched_inputs: list[Sample]) -> list[Sample]:
        """
        Args:
            batched_inputs: dicts with "image", (C, h, w) uint8, and "height", "width" of the wanted output; the
                copies are made from that image, so it had better have all its pixels.
        """
        assert not self.model.training, "test-time augmentation needs eval mode; call model.eval() first"
        return [{"instances": self._one_image(sample)} for sample in batched_inputs]

    def _one_image(self, sample: Sample) -> Instances:
        height, width = (
            int(sample.get(key, length))
            for key, length in zip(("height", "width"), sample["image"].shape[1:])
        )
        image = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())  # (h, w, C)
        passes: list[_Pass] = []
        found: list[Instances] = []
        free = self.keep_features_bytes
        with self._switched(mask_on=False, soft_nms_on=False):
            for resize in self.resizes:
                one = _Pass(resize.get_transform(image), self.flip, (height, width))
                images, features = self._run_backbone(one, image)
                proposals, _ = self.model.proposal_generator(images, features, None)
                detections, _ = self.model.roi_heads(images, features, proposals, None)
                found += [one.to_original(*pair) for pair in zip(detections, one.mirrored)]
                needed = sum(level.numel() * level.element_size() for level in features.values())
                if needed <= free:
                    one.features, free = features, free - needed
                passes.append(one)
        merged = self._merge(found)
        if getattr(self.model.roi_heads, "mask_on", False):
            merged.pred_masks = self._mean_masks(passes, image, merged)
        return detector_postprocess(merged, height, width)

    def _run_backbone(self, one: _Pass, image: np.ndarray) -> tuple[Any, dict[str, Tensor]]:
        resized = one.resize.apply_image(image)
        copies = [resized[:, ::-1] if mirrored else resized for mirrored in one.mirrored]
        batch = [{"image": torch.from_numpy(np.ascontiguousarray(c.transpose(2, 0, 1)))} for c in copies]
        one.size = (resized.shape[0], resized.shape[1])
        model = self.model
        limit = model.backbone.padding_constraints.get("square_size", 0)
        if 0 < limit < max(one.size):
            raise ValueError(
                f"TEST.AUG: a copy of {one.size[0]} x {one.size[1]} pixels does not fit the {limit} x {limit} square "
                "that the backbone asks for; lower MIN_SIZES and MAX_SIZE."
            )
        square = getattr(model, "square", 0)
        try:
            if square:  # INPUT.SCALE_CROP.TEST_RESIZE: square; each size has its own
                model.square = max(one.size)
            images = model.preprocess_image(batch)
        finally:
            if square:
                model.square = square
        return images, model.backbone(images.tensor)

    def _merge(self, found: list[Instances]) -> Instances:
        everything = Instances.cat(found)
        everything.pred_boxes.clip(everything.image_size)
        if self.soft_nms is not None:
            return self.soft_nms(everything)
        kept = batched_nms(
            everything.pred_boxes.tensor, everything.scores, everything.pred_classes, self.nms_threshold
        )
        return everything[kept[: self.topk] if self.topk >= 0 else kept]

    def _mean_masks(self, passes: list[_Pass], image: np.ndarray, merged: Instances) -> Tensor:
        """(N, 1, side, side) probabilities over the boxes."""
        total: Any = 0
        for one in passes:
            features = one.features if one.features is not None else self._run_backbone(one, image)[1]
            one.features = None
            given = [one.from_original(merged, mirrored) for mirrored in one.mirrored]
            for masked, mirrored in zip(
                self.model.roi_heads.forward_with_given_boxes(features, given), one.mirrored
            ):
                total = total + (masked.pred_masks.flip(dims=[3]) if mirrored else masked.pred_masks)
        return total / sum(len(one.mirrored) for one in passes)

    @contextmanager
    def _switched(self, **switches: bool) -> Iterator[None]:
        """Attributes of the ROI heads for a while; those that they do not have are left out."""
        heads = self.model.roi_heads
        before = {name: getattr(heads, name) for name in switches if hasattr(heads, name)}
        try:
            for name in before:
                setattr(heads, name, switches[name])
            yield
        finally:
            for name, value in before.items():
                setattr(heads, name, value)


def resizes_for_test(cfg: CfgNode) -> list[T.Augmentation]:
    """One resize per TEST.AUG.MIN_SIZES, of the side that the plain test resize is about; MAX_SIZE limits both."""
    opts, scale_crop = cfg.TEST.AUG, cfg.INPUT.SCALE_CROP
    long_side = cfg.INPUT.AUGMENTATION == "scale_crop" and scale_crop.TEST_RESIZE != "shortest_edge"
    return [
        T.ResizeShortestEdge(*((min(size, opts.MAX_SIZE),) * 2 if long_side else (size, opts.MAX_SIZE)))
        for size in opts.MIN_SIZES
    ]


@dataclass
class _Pass:
    """The copies of one size, and how their coordinates belong to the original image's."""

    resize: Any
    flip: bool
    original_hw: tuple[int, int]
    size: tuple[int, int] = (0, 0)
    features: dict[str, Tensor] | None = None

    @property
    def mirrored(self) -> tuple[bool, ...]:
        return (False, True) if self.flip else (False,)

    def to_original(self, detections: Instances, mirrored: bool) -> Instances:
        """Boxes, scores and classes of a copy -> those of the original image."""
        boxes = detections.pred_boxes.tensor
        if mirrored:
            boxes = _mirror(boxes, self.size[1])
        moved = Instances(self.original_hw)
        moved.pred_boxes = Boxes(boxes * self._scale(boxes))
        moved.scores, moved.pred_classes = detections.scores, detections.pred_classes
        return moved

    def from_original(self, merged: Instances, mirrored: bool) -> Instances:
        """Boxes and classes of the original image -> those of a copy."""
        boxes = merged.pred_boxes.tensor
        boxes = boxes / self._scale(boxes)
        moved = Instances(self.size)
        moved.pred_boxes = Boxes(_mirror(boxes, self.size[1]) if mirrored else boxes)
        moved.scores, moved.pred_classes = merged.scores, merged.pred_classes
        return moved

    def _scale(self, like: Tensor) -> Tensor:
        """Original pixels per pixel of the copy, as (x, y, x, y)."""
        y, x = (original / own for original, own in zip(self.original_hw, self.size))
        return like.new_tensor([x, y, x, y])


def _mirror(boxes: Tensor, width: int) -> Tensor:
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
