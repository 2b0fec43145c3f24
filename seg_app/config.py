"""Every config key of semantic segmentation beside those of the heads (models/config.py) and of d2_frozen.

Names are Mask2Former's where it has the key.
"""

from __future__ import annotations

from d2_frozen.config import add_frozen_config
from detectron2.config import CfgNode


def add_segmentation_config(cfg: CfgNode) -> CfgNode:
    """Add the keys of d2_frozen, of the heads and of this app, in place; register models, datasets, entry types.

    Returns:
        The same ``cfg``, for chaining.
    """
    # Imported here: a config of another task must not load segmentation.
    import seg_app.data  # noqa: F401
    from seg_app.models import add_mask_former_config

    add_mask_former_config(add_frozen_config(cfg))
    cfg.MODEL.META_ARCHITECTURE = "FrozenSegmentor"
    # The heads have a neck inside.
    cfg.MODEL.NECK.NAME = "none"

    # Training: random short edge (MIN_SIZE_TRAIN, MIN_SIZE_TRAIN_SAMPLING, MAX_SIZE_TRAIN), crop (CROP), colours, flip.
    # A share of a crop: one class may not have more of it. Up to ten crops are drawn. 1.0 takes the first.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0
    # SSD's colour jitter: brightness, contrast, saturation, hue.
    cfg.INPUT.COLOR_AUG_SSD = False
    # Label maps do not tell their sizes before they are read.
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False

    # Testing piece by piece, for images that are larger than those in training, or than memory.
    cfg.TEST.SLIDING_WINDOW = CfgNode()
    # Side of the window in pixels, after resizing by MIN_SIZE_TEST; 0: the whole image at once.
    cfg.TEST.SLIDING_WINDOW.SIZE = 0
    # Part of a window that the next one covers too, at least; scores are averaged there.
    cfg.TEST.SLIDING_WINDOW.OVERLAP = 0.33
    # Predicted label maps in OUTPUT_DIR/inference/predictions/NAME/*.png.
    cfg.TEST.SAVE_PREDICTIONS = True
    return cfg
