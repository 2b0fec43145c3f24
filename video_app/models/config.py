"""Config keys of the video heads, of how clips go through the backbone, and of the probe sweep."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_video_head_config(cfg: CfgNode) -> CfgNode:
    """Add MODEL.VIDEO_HEAD, in place.

    Returns:
        The same ``cfg``, for chaining.
    """
    cfg.MODEL.VIDEO_HEAD = CfgNode()
    _add_head_keys(cfg.MODEL.VIDEO_HEAD)
    _add_block_keys(cfg.MODEL.VIDEO_HEAD)
    _add_sweep_keys(cfg.MODEL.VIDEO_HEAD)
    return cfg


def _add_head_keys(head: CfgNode) -> None:
    # "LinearVideoHead" (mean over time and space, then one linear layer), "TemporalVideoHead" (blocks that attend over
    # time at each position), "GlobalVideoHead" (over all T*H*W cells), "SpatialTemporalVideoHead" (over the cells of
    # each frame, then over time), "AttentiveProbe" (a learned query looks at all cells). Or a name that you
    # register in video_app.models.VIDEO_HEADS_REGISTRY.
    head.NAME = "TemporalVideoHead"
    # Maps of the backbone that the head sees. []: the last one only (res5; of a plain ViT "plain"). Several are
    # averaged down to the coarsest one's cells, normalised each (LayerNorm, trained), and concatenated.
    head.IN_FEATURES = []
    # -1: from the data.
    head.NUM_CLASSES = 400
    # Dropout on the pooled features, in front of the last linear layer. Video Swin's head has 0.5.
    head.CLASSIFIER_DROPOUT = 0.5
    # Share of the target that is spread evenly over all classes, in training.
    head.LABEL_SMOOTHING = 0.1
    # Frames that go through a frozen backbone (at test: through any) at once; bounds memory, not results.
    head.FRAMES_PER_PASS = 128


def _add_block_keys(head: CfgNode) -> None:
    # All of these are for heads with transformer blocks, so not for LinearVideoHead.
    # N. The paper's Table 4 has 4. AttentiveProbe: NUM_BLOCKS - 1 blocks of global attention, then the one in which the
    # query looks: 1 is the attentive pooling of V-JEPA, 4 the probe of V-JEPA 2.
    head.NUM_BLOCKS = 4
    # Channels of the blocks; a linear layer leads to them. 0: as many as the backbone's map has, without that layer.
    head.WIDTH = 0
    # Native size of the learned positions: frames, rows and columns of cells. 0: as VIDEO.NUM_FRAMES, and CROP_SIZE
    # over the stride. They are interpolated to any other clip, so set it where VIDEO is not what the weights were
    # trained on: (16, 7, 7) for those of 16 frames of 224 px on a map of stride 32.
    head.POSITIONS = (0, 0, 0)
    # Attention heads; 0: one for every 64 channels.
    head.NUM_HEADS = 0
    # Hidden channels of the feed-forward layers, relative to the width.
    head.MLP_RATIO = 4.0
    # Behind each attention and inside the feed-forward layers.
    head.DROPOUT = 0.0
    # Stochastic depth: chance that a clip skips the last block's branches; rises linearly from 0 at the first block.
    head.DROP_PATH = 0.1


def _add_sweep_keys(head: CfgNode) -> None:
    # MODEL.META_ARCHITECTURE FrozenVideoSweep: many heads on one frozen forward, every combination of these lists. Each
    # trains exactly as it would alone (but for SOLVER.AMP on a GPU, where they share the scale of the loss and skip
    # the same steps). [] means one value: that of VIDEO_HEAD.NAME, SOLVER.BASE_LR, SOLVER.WEIGHT_DECAY.
    head.SWEEP = CfgNode()
    head.SWEEP.NAMES = []
    head.SWEEP.LR = []
    head.SWEEP.WEIGHT_DECAY = []
    # Heads that are written as runs of their own, OUTPUT_DIR/sweep/NN/{config.yaml, model_final.pth}: "best" or "all".
    head.SWEEP.SAVE = "best"
