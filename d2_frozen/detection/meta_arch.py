"""Meta-architecture: Detectron2's GeneralizedRCNN, which knows what of it is frozen.

In: Detectron2's list of dicts.  Out: losses when training, else Detectron2's list of {"instances"}.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from d2_frozen.backbone import FrozenBackbone
from d2_frozen.summary import RestOf
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN


@META_ARCH_REGISTRY.register()
class FrozenRCNN(GeneralizedRCNN):
    """R-CNN whose bottom-up network is frozen: Faster, Mask or Cascade by ``MODEL.ROI_HEADS.NAME``.

    Source: Lin et al., arXiv 2211.02043, section 3.1; the networks around it are those of the config.

    Args:
        freeze: ``MODEL.BACKBONE.FREEZE``; with "all" there must be a :class:`FrozenBackbone` in the backbone.
        kwargs: those of GeneralizedRCNN.
    Raises:
        ValueError: the backbone of the config does not freeze what FREEZE says.
    """

    @configurable
    def __init__(self, *, freeze: str | int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if freeze == "all" and self.frozen_backbone is None:
            raise ValueError(
                "MODEL.BACKBONE.FREEZE: all, but the backbone has no frozen part. Set MODEL.BACKBONE.NAME: "
                "build_frozen_backbone (MODEL.FROZEN.BOTTOM_UP names the network inside), or FREEZE: none."
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {"freeze": cfg.MODEL.BACKBONE.FREEZE, **super().from_config(cfg)}

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
        yield "proposal_generator", self.proposal_generator
        mask_heads = [name for name, _ in self.roi_heads.named_children() if name.startswith("mask")]
        yield "roi_heads (box)", RestOf(self.roi_heads, *mask_heads)
        for name in mask_heads:
            if any(True for _ in getattr(self.roi_heads, name).parameters()):
                yield f"roi_heads.{name}", getattr(self.roi_heads, name)
