"""Detection on the frozen pyramid: boxes and masks. Importing it registers the meta-architecture."""

from d2_frozen.detection.meta_arch import FrozenRCNN

__all__ = ["FrozenRCNN"]
