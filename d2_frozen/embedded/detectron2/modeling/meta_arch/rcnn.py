"""Two-stage detectors: backbone, proposals, ROI heads (R-CNN family), or the first two alone.

In: a list of dicts, one per image, as DatasetMapper makes them: "image" (C, H, W) in 0..255, in training
"instances", optionally "height" and "width" of the wanted output in pixels.
Out: a dict of losses in training, else one dict per image with "instances" (or "proposals").
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from detectron2.config import configurable
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage

from ..backbone import Backbone, build_backbone
from ..postprocessing import detector_postprocess
from ..proposal_generator import build_proposal_generator
from ..roi_heads import build_roi_heads
from .build import META_ARCH_REGISTRY

__all__ = ["GeneralizedRCNN", "ProposalNetwork"]

Batch = list[dict[str, Any]]


class _PixelModel(nn.Module):
    """Knows mean and deviation of pixels, and the device that they are on."""

    def _set_pixel_statistics(self, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...]) -> None:
        # Not persistent: they belong to the config, and checkpoints stay free of them.
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        if self.pixel_mean.shape != self.pixel_std.shape:
            raise ValueError(
                f"MODEL.PIXEL_MEAN has {len(self.pixel_mean)} values, MODEL.PIXEL_STD {len(self.pixel_std)}"
            )

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs: Batch) -> ImageList:
        """Normalise the images, and pad them to one size that the backbone accepts."""
        images = [
            (one["image"].to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std
            for one in batched_inputs
        ]
        return ImageList.from_tensors(
            images,
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )


def _pixel_statistics(cfg) -> dict[str, Any]:
    return {"pixel_mean": cfg.MODEL.PIXEL_MEAN, "pixel_std": cfg.MODEL.PIXEL_STD}


@META_ARCH_REGISTRY.register()
class GeneralizedRCNN(_PixelModel):
    """Any detector with a backbone, a proposal generator and ROI heads."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module | None,
        roi_heads: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        input_format: str | None = None,
        vis_period: int = 0,
    ):
        """
        Args:
            backbone: images -> maps by name.
            proposal_generator: as :class:`RPN`; None if the data brings "proposals".
            roi_heads: as :class:`ROIHeads`.
            pixel_mean, pixel_std: per channel, in the order of ``input_format``, in 0..255.
            input_format: "RGB" or "BGR"; only pictures need it.
            vis_period: > 0 to put a picture of proposals into the EventStorage every so many iterations.
        """
        super().__init__()
        if vis_period > 0 and input_format is None:
            raise ValueError("VIS_PERIOD above 0 needs input_format (INPUT.FORMAT), to draw in true colours")
        self.vis_period = vis_period
        self.input_format = input_format
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self._set_pixel_statistics(pixel_mean, pixel_std)

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, shapes),
            "roi_heads": build_roi_heads(cfg, shapes),
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            **_pixel_statistics(cfg),
        }

    def forward(self, batched_inputs: Batch) -> dict[str, torch.Tensor] | Batch:
        """Losses in training mode, else :meth:`inference`."""
        if not self.training:
            return self.inference(batched_inputs)
        images = self.preprocess_image(batched_inputs)
        truth = None
        if "instances" in batched_inputs[0]:
            truth = [one["instances"].to(self.device) for one in batched_inputs]
        features = self.backbone(images.tensor)
        proposals, losses = self._propose(images, features, batched_inputs, truth)
        _, head_losses = self.roi_heads(images, features, proposals, truth)
        if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
            self.visualize_training(batched_inputs, proposals)
        return {**head_losses, **losses}

    def inference(
        self,
        batched_inputs: Batch,
        detected_instances: list[Instances] | None = None,
        do_postprocess: bool = True,
    ) -> Batch | list[Instances]:
        """Detect objects.

        Args:
            batched_inputs: see the top of the file.
            detected_instances: per image ``pred_boxes`` and ``pred_classes`` in pixels of the network input;
                then only the rest (masks) is predicted.
            do_postprocess: scale results to the wanted output size and paste masks.
        Returns:
            [{"instances": Instances}], or the bare Instances of the network input without postprocessing.
        """
        assert not self.training, "inference() needs eval mode; call model.eval() first"
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        if detected_instances is None:
            proposals, _ = self._propose(images, features, batched_inputs, None)
            results, _ = self.roi_heads(images, features, proposals, None)
        else:
            given = [one.to(self.device) for one in detected_instances]
            results = self.roi_heads.forward_with_given_boxes(features, given)
        if do_postprocess:
            return self._postprocess(results, batched_inputs, images.image_sizes)
        return results

    def _propose(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        batched_inputs: Batch,
        truth: list[Instances] | None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        if self.proposal_generator is not None:
            return self.proposal_generator(images, features, truth)
        if "proposals" not in batched_inputs[0]:
            raise ValueError(
                "a model without proposal generator needs 'proposals' in its input; "
                "set MODEL.LOAD_PROPOSALS: True and DATASETS.PROPOSAL_FILES_TRAIN/TEST"
            )
        return [one["proposals"].to(self.device) for one in batched_inputs], {}

    def visualize_training(self, batched_inputs: Batch, proposals: list[Instances]) -> None:
        """Put a picture of the first image into the EventStorage: true boxes beside the best 20 proposals."""
        # Pictures are rare, and what draws them is slow to import.
        from detectron2.data.detection_utils import convert_image_to_rgb
        from detectron2.utils.visualizer import Visualizer

        if not batched_inputs:
            return
        one, best = batched_inputs[0], proposals[0][:20]
        image = convert_image_to_rgb(one["image"].permute(1, 2, 0), self.input_format)
        pictures = []
        for boxes in (one["instances"].gt_boxes, best.proposal_boxes.tensor.cpu().numpy()):
            pictures.append(Visualizer(image, None).overlay_instances(boxes=boxes).get_image())
        side_by_side = np.concatenate(pictures, axis=1).transpose(2, 0, 1)
        get_event_storage().put_image("Left: GT bounding boxes;  Right: Predicted proposals", side_by_side)

    @staticmethod
    def _postprocess(
        instances: list[Instances], batched_inputs: Batch, image_sizes: list[tuple[int, int]]
    ) -> Batch:
        """Scale results to "height" and "width" of the input dict; default: the network input's size."""
        results = []
        for found, one, (height, width) in zip(instances, batched_inputs, image_sizes):
            found = detector_postprocess(found, one.get("height", height), one.get("width", width))
            results.append({"instances": found})
        return results


@META_ARCH_REGISTRY.register()
class ProposalNetwork(_PixelModel):
    """Backbone and proposal generator only: class-agnostic boxes."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        proposal_generator: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
    ):
        """See :class:`GeneralizedRCNN`."""
        super().__init__()
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self._set_pixel_statistics(pixel_mean, pixel_std)

    @classmethod
    def from_config(cls, cfg) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "proposal_generator": build_proposal_generator(cfg, backbone.output_shape()),
            **_pixel_statistics(cfg),
        }

    def forward(self, batched_inputs: Batch) -> dict[str, torch.Tensor] | Batch:
        """Losses in training mode, else [{"proposals": Instances}] scaled to the wanted output size."""
        images = self.preprocess_image(batched_inputs)
        truth = None
        if "instances" in batched_inputs[0]:
            truth = [one["instances"].to(self.device) for one in batched_inputs]
        proposals, losses = self.proposal_generator(images, self.backbone(images.tensor), truth)
        if self.training:
            return losses
        results = []
        for found, one, (height, width) in zip(proposals, batched_inputs, images.image_sizes):
            found = detector_postprocess(found, one.get("height", height), one.get("width", width))
            results.append({"proposals": found})
        return results
