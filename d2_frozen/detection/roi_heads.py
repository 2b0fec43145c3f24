"""ROI heads whose last step is Soft-NMS: Detectron2's two, and HTC's.

FrozenRCNN takes them in place of those in MODEL.ROI_HEADS.NAME where MODEL.ROI_HEADS.NMS_TYPE says so; parameters are
the same.
"""

from __future__ import annotations

from typing import Any

from d2_frozen.detection.htc import HTCROIHeads
from d2_frozen.detection.soft_nms import SoftNMS
from detectron2.config import CfgNode, configurable
from detectron2.modeling import ROI_HEADS_REGISTRY, ROIHeads, StandardROIHeads
from detectron2.modeling.roi_heads.cascade_rcnn import CascadeROIHeads

# No IoU lies above it: hard NMS then keeps every box.
_NO_NMS = 2.0


class _EndsWithSoftNMS(ROIHeads):
    """Mixin: the heads' own NMS and limit are off, what they then find goes through Soft-NMS.

    ``soft_nms_on`` False leaves it out: all candidates above the score threshold, for a later merge.
    """

    @configurable
    def __init__(self, *, soft_nms: SoftNMS, **kwargs: Any):
        super().__init__(**kwargs)
        self.soft_nms = soft_nms
        self.soft_nms_on = True
        stages = (
            [self.box_predictor] if hasattr(self.box_predictor, "test_nms_thresh") else self.box_predictor
        )
        for predictor in stages:
            predictor.test_nms_thresh = _NO_NMS
            predictor.test_topk_per_image = -1

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        soft_nms = SoftNMS.from_config(cfg)
        if soft_nms is None:
            raise ValueError(f"{cls.__name__} needs a soft one of MODEL.ROI_HEADS.NMS_TYPE, not nms.")
        return {"soft_nms": soft_nms, **super().from_config(cfg, input_shape)}

    def _forward_box(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._forward_box(*args, **kwargs)
        if self.training or not self.soft_nms_on:
            return found
        return [self.soft_nms(one) for one in found]


@ROI_HEADS_REGISTRY.register()
class SoftNMSStandardROIHeads(_EndsWithSoftNMS, StandardROIHeads):
    """StandardROIHeads with Soft-NMS."""


@ROI_HEADS_REGISTRY.register()
class SoftNMSCascadeROIHeads(_EndsWithSoftNMS, CascadeROIHeads):
    """CascadeROIHeads with Soft-NMS."""


@ROI_HEADS_REGISTRY.register()
class SoftNMSHTCROIHeads(_EndsWithSoftNMS, HTCROIHeads):
    """HTCROIHeads with Soft-NMS."""


def heads_for_nms_type(cfg: CfgNode) -> str:
    """The name of the ROI heads that do what MODEL.ROI_HEADS.NAME and NMS_TYPE say.

    Raises:
        ValueError: no such NMS_TYPE, or Soft-NMS for heads that do not have it.
    """
    name = cfg.MODEL.ROI_HEADS.NAME.removeprefix("SoftNMS")
    if SoftNMS.from_config(cfg) is None:
        return name
    if name not in ("StandardROIHeads", "CascadeROIHeads", "HTCROIHeads"):
        raise ValueError(
            f"MODEL.ROI_HEADS.NMS_TYPE is {cfg.MODEL.ROI_HEADS.NMS_TYPE}, which MODEL.ROI_HEADS.NAME {name} does not "
            "know; set nms, or use StandardROIHeads, CascadeROIHeads or HTCROIHeads."
        )
    return f"SoftNMS{name}"
