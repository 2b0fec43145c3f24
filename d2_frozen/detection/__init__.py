"""Detection on the frozen pyramid: boxes and masks. Importing it registers meta-architecture and ROI heads."""

from d2_frozen.detection.htc import HTCROIHeads
from d2_frozen.detection.meta_arch import FrozenRCNN
from d2_frozen.detection.soft_nms import SoftNMS, soft_nms
from d2_frozen.detection.test_time_augmentation import FrozenRCNNWithTTA, evaluate_with_tta

__all__ = ["FrozenRCNN", "FrozenRCNNWithTTA", "HTCROIHeads", "SoftNMS", "evaluate_with_tta", "soft_nms"]
