"""Meta-architecture: a backbone, frozen or not, and a head that labels every pixel.

In: Detectron2's list of dicts: "image" (3, H, W) in 0..255; in training "sem_seg" (H, W) class ids (or "instances" with
gt_classes and gt_masks, for mask heads); optionally "height", "width" of the wanted output.
Out: losses in training, else per image {"sem_seg": (K, height, width)} scores, as Detectron2's SemanticSegmentor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from d2_frozen.backbone import FrozenBackbone
from d2_frozen.data.label_values import values_in
from d2_frozen.summary import RestOf
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone, build_sem_seg_head
from detectron2.structures import ImageList
from seg_app.models.criterion import SetCriterion
from seg_app.models.inference import top_instances
from seg_app.models.score_maps import ClassesOfQueries, Cut, Given, Resized, ScoreMap
from seg_app.models.targets import mask_targets, padded_labels

Batch = list[dict[str, Any]]


@META_ARCH_REGISTRY.register()
class FrozenSegmentor(nn.Module):
    """Semantic segmentation with any head of ``MODEL.SEM_SEG_HEAD.NAME``.

    Two kinds of heads: mask heads give classes and masks of queries, and come with a criterion
    (:class:`Mask2FormerHead`); pixel heads give logits per pixel and their own loss, as Detectron2's do.

    Args:
        backbone: images -> maps by name.
        sem_seg_head: on those maps.
        criterion: of a mask head; None for a pixel head.
        num_classes, ignore_value: of the labels.
        pixel_mean, pixel_std: per channel, in 0..255.
        size_divisibility: images are padded to multiples of it, in pixels, and of what the backbone wants.
        freeze: ``MODEL.BACKBONE.FREEZE``; with "all" there must be a :class:`FrozenBackbone` in the backbone.
        semantic_on, instance_on: which results a mask head gives.
        resize_first: bring masks to the output size before they become classes; instances always do.
        max_instances: per image.
    Raises:
        ValueError: the backbone does not freeze what ``freeze`` says; the ignore label is a class.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        criterion: SetCriterion | None,
        num_classes: int,
        ignore_value: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        size_divisibility: int = 32,
        freeze: str | int = "none",
        semantic_on: bool = True,
        instance_on: bool = False,
        resize_first: bool = False,
        max_instances: int = 100,
    ) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.num_classes = num_classes
        self.ignore_value = ignore_value
        self.size_divisibility = math.lcm(max(1, size_divisibility), max(1, backbone.size_divisibility))
        self.semantic_on = semantic_on
        self.instance_on = instance_on
        self.resize_first = resize_first or instance_on
        self.max_instances = max_instances
        if freeze == "all" and self.frozen_backbone is None:
            raise ValueError(
                "MODEL.BACKBONE.FREEZE is all, but no part of the backbone is frozen. MODEL.BACKBONE.NAME "
                "build_frozen_backbone freezes the network that MODEL.FROZEN.BOTTOM_UP names; FREEZE none trains it."
            )
        if num_classes < 1 or 0 <= ignore_value < num_classes:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes} and IGNORE_VALUE {ignore_value}: there must be a "
                "class, and the ignore label must be none of them (65535 for 16-bit labels, for instance)."
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        head_cfg, m = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        missing = [name for name in head_cfg.IN_FEATURES if name not in shapes]
        if missing:
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES asks for {', '.join(missing)}; the backbone gives {', '.join(shapes)}."
            )
        head = build_sem_seg_head(cfg, shapes)
        build_criterion = getattr(head, "criterion", None)
        return {
            "backbone": backbone,
            "sem_seg_head": head,
            "criterion": build_criterion(cfg) if build_criterion else None,
            "num_classes": head_cfg.NUM_CLASSES,
            "ignore_value": head_cfg.IGNORE_VALUE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "size_divisibility": m.SIZE_DIVISIBILITY,
            "freeze": cfg.MODEL.BACKBONE.FREEZE,
            "semantic_on": m.TEST.SEMANTIC_ON,
            "instance_on": m.TEST.INSTANCE_ON,
            "resize_first": m.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE,
            "max_instances": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def frozen_backbone(self) -> FrozenBackbone | None:
        """The frozen part; None with full fine-tuning."""
        return next((m for m in self.backbone.modules() if isinstance(m, FrozenBackbone)), None)

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of every part, for the table at the start of a run. Together they are the whole model."""
        bottom_up = getattr(self.backbone, "bottom_up", None)
        if bottom_up is None:
            yield "backbone", self.backbone
        else:
            yield "backbone.bottom_up", bottom_up
            yield "neck", RestOf(self.backbone, "bottom_up")
        inner = [name for name in ("pixel_decoder", "predictor") if hasattr(self.sem_seg_head, name)]
        if self.criterion is None or not inner:
            yield "sem_seg_head", self.sem_seg_head
            return
        for name in inner:
            yield f"sem_seg_head.{name}", getattr(self.sem_seg_head, name)

    def forward(self, batched_inputs: Batch) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Losses in training mode, else the results of every image at its wanted size."""
        if self.training:
            images = self.preprocess_image(batched_inputs)
            size = (images.tensor.shape[-2], images.tensor.shape[-1])
            return self._losses(self.backbone(images.tensor), batched_inputs, size)
        results = []
        for classes, masks, scores in self._found(batched_inputs):
            result: dict[str, Any] = {}
            if scores is not None:
                result["sem_seg"] = scores.all()
            if self.instance_on and classes is not None and masks is not None:
                result["instances"] = top_instances(classes, masks.all(), self.max_instances)
            results.append(result)
        return results

    def score_maps(self, batched_inputs: Batch) -> list[ScoreMap]:
        """What "sem_seg" is made of, for images whose scores are too large for memory; not in training mode.

        Raises:
            ValueError: MODEL.MASK_FORMER.TEST.SEMANTIC_ON is False.
        """
        if not self.semantic_on:
            raise ValueError(
                "MODEL.MASK_FORMER.TEST.SEMANTIC_ON is False, so there are no scores of classes; set it to True."
            )
        assert not self.training
        return [scores for _, _, scores in self._found(batched_inputs) if scores is not None]

    def preprocess_image(self, batched_inputs: Batch) -> ImageList:
        """Normalised images, padded to one size with zeros."""
        given = [one["image"].to(self.device, non_blocking=True) for one in batched_inputs]
        images = [(one - self.pixel_mean) / self.pixel_std for one in given]
        return ImageList.from_tensors(
            images, self.size_divisibility, padding_constraints=self.backbone.padding_constraints
        )

    def _losses(self, features: dict[str, Tensor], batch: Batch, size: tuple[int, int]) -> dict[str, Tensor]:
        labels = (batch, size, self.num_classes, self.ignore_value, self.device)
        if self.criterion is None:
            targets = padded_labels(*labels)
            if any(value != self.ignore_value for one in batch for value in values_in(one)):
                return self.sem_seg_head(features, targets)[1]
            # Detectron2's head takes a mean over the labelled pixels: of none, that is no number, and ends the run.
            losses = self.sem_seg_head(features, torch.zeros_like(targets))[1]
            return {name: loss * 0.0 for name, loss in losses.items()}
        targets = mask_targets(*labels)
        # Without deep supervision the earlier layers' losses have no weight.
        every_layer = "loss_ce_0" in self.criterion.weight_dict
        predictions = self.sem_seg_head(features, every_layer=every_layer, full_masks=False)
        return self.criterion.weighted(self.criterion(predictions, targets))

    def _found(self, batch: Batch) -> Iterator[tuple[Tensor | None, ScoreMap | None, ScoreMap | None]]:
        """Per image, at its wanted size: classes of queries and their masks (mask heads), scores of classes."""
        images = self.preprocess_image(batch)
        features = self.backbone(images.tensor)
        padded = (images.tensor.shape[-2], images.tensor.shape[-1])
        wanted = [
            (int(one.get("height", h)), int(one.get("width", w)))
            for one, (h, w) in zip(batch, images.image_sizes)
        ]
        if self.criterion is None:
            for logits, inner, out in zip(self._pixel_logits(features), images.image_sizes, wanted):
                yield None, None, Resized(Cut(logits, inner), out)
            return
        predictions = self.sem_seg_head(features)
        for classes, given, inner, out in zip(
            predictions["pred_logits"], predictions["pred_masks"], images.image_sizes, wanted
        ):
            masks: ScoreMap = Resized(Given(given), padded)
            if self.resize_first:
                masks = Resized(Cut(masks, inner), out)
                yield classes, masks, ClassesOfQueries(classes, masks) if self.semantic_on else None
            else:
                scores = Resized(Cut(ClassesOfQueries(classes, masks), inner), out)
                yield classes, masks, scores if self.semantic_on else None

    def _pixel_logits(self, features: dict[str, Tensor]) -> list[ScoreMap]:
        """Of a pixel head; where it can be asked for them (as Detectron2's), before they are brought to full size."""
        head: Any = self.sem_seg_head
        stride = getattr(head, "stride", None) or getattr(head, "common_stride", None)
        if stride is None or not hasattr(head, "layers"):
            return [Given(one) for one in head(features)[0]]
        small = head.layers(features)
        size = (small.shape[-2] * stride, small.shape[-1] * stride)
        return [Resized(Given(one), size) for one in small]
