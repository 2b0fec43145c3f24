"""Detection on the frozen pyramid: boxes and masks. Importing it registers meta-architecture and ROI heads."""

from d2_frozen.detection.htc import HTCROIHeads
from d2_frozen.detection.meta_arch import FrozenRCNN
from d2_frozen.detection.soft_nms import SoftNMS, soft_nms

__all__ = ["FrozenRCNN", "HTCROIHeads", "SoftNMS", "soft_nms"]
