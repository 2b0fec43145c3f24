"""Meta-architecture: Detectron2's GeneralizedRCNN, which knows what of it is frozen.

In: Detectron2's list of dicts.  Out: losses when training, else Detectron2's list of {"instances"}.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import nn

from d2_frozen.backbone import FrozenBackbone
from d2_frozen.data.transforms import padded_square
from d2_frozen.detection.roi_heads import heads_for_nms_type
from d2_frozen.detection.semantic import padded_label_maps
from d2_frozen.summary import RestOf, backbone_parts
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.structures import ImageList


@META_ARCH_REGISTRY.register()
class FrozenRCNN(GeneralizedRCNN):
    """R-CNN whose bottom-up network is frozen: Faster, Mask, Cascade or HTC by ``MODEL.ROI_HEADS.NAME``.

    Source: Lin et al., arXiv 2211.02043, section 3.1; the networks around it are those of the config.

    Args:
        freeze: ``MODEL.BACKBONE.FREEZE``; with "all" there must be a :class:`FrozenBackbone` in the backbone.
        square: images are padded, right and below, to this many pixels on both sides; larger ones stay.
        kwargs: those of GeneralizedRCNN.
    Raises:
        ValueError: the backbone of the config does not freeze what FREEZE says, or its class count is still -1.
    """

    @configurable
    def __init__(self, *, freeze: str | int, square: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.square = square
        if freeze == "all" and self.frozen_backbone is None:
            raise ValueError(
                "MODEL.BACKBONE.FREEZE: all, but the backbone has no frozen part. Set MODEL.BACKBONE.NAME: "
                "build_frozen_backbone (MODEL.FROZEN.BOTTOM_UP names the network inside), or FREEZE: none."
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        if cfg.MODEL.ROI_HEADS.NUM_CLASSES < 0:
            raise ValueError(
                "MODEL.ROI_HEADS.NUM_CLASSES is -1 (take it from the data). train_net.py does that; in code of your "
                "own, call d2_frozen.data.prepare_datasets(cfg) before the model is built (where the datasets are "
                "registered, resolve_num_classes(cfg) is enough), or set the number."
            )
        own = {"freeze": cfg.MODEL.BACKBONE.FREEZE, "square": padded_square(cfg)}
        heads = heads_for_nms_type(cfg)
        if heads != cfg.MODEL.ROI_HEADS.NAME:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.ROI_HEADS.NAME = heads
        try:
            return {**own, **super().from_config(cfg)}
        except KeyError as err:
            raise _missing_level(cfg, err) from err

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """As GeneralizedRCNN's; then the padding to a square, with the mean colour as ever.

        In training, label maps for heads with a semantic branch lie in ``sem_seg`` of the result, (B, H, W).
        """
        images = super().preprocess_image(batched_inputs)
        divisor = max(1, self.backbone.size_divisibility)
        side = math.ceil(self.square / divisor) * divisor
        below, right = (max(0, side - length) for length in images.tensor.shape[-2:])
        if below or right:
            images = ImageList(F.pad(images.tensor, (0, right, 0, below)), images.image_sizes)
        branch = getattr(self.roi_heads, "semantic_branch", None)
        if self.training and branch is not None:
            padded_hw = tuple(images.tensor.shape[-2:])
            labels = padded_label_maps(batched_inputs, padded_hw, branch.num_classes, branch.ignore_value)
            images.sem_seg = labels.to(images.tensor.device, non_blocking=True)
        return images

    @property
    def frozen_backbone(self) -> FrozenBackbone | None:
        """The frozen part; None with full fine-tuning."""
        return next((m for m in self.backbone.modules() if isinstance(m, FrozenBackbone)), None)

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of every part, for the table at the start of a run. Together they are the whole model."""
        yield from backbone_parts("backbone", self.backbone)
        yield "proposal_generator", self.proposal_generator
        others = [
            name for name, _ in self.roi_heads.named_children() if name.startswith(("mask", "semantic"))
        ]
        yield "roi_heads (box)", RestOf(self.roi_heads, *others)
        for name in others:
            if any(True for _ in getattr(self.roi_heads, name).parameters()):
                yield f"roi_heads.{name}", getattr(self.roi_heads, name)


def _missing_level(cfg: CfgNode, err: KeyError) -> Exception:
    """What to say where a head asks for a level of the pyramid that is not there; any other error as it is."""
    asked = {f"MODEL.{part}.IN_FEATURES": list(cfg.MODEL[part].IN_FEATURES) for part in ("RPN", "ROI_HEADS")}
    named = [f"{key} is {names}" for key, names in asked.items() if err.args and err.args[0] in names]
    if not named:
        return err
    return ValueError(
        f"{' and '.join(named)}, but the backbone gives no {err.args[0]!r} "
        f"(MODEL.NECK.NAME: {cfg.MODEL.NECK.NAME}). Necks give p2 to p6, none gives res2 to res5."
    )
