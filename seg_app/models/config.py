"""Config keys of the segmentation heads: Mask2Former's names, with its values for ADE20K as defaults."""

from __future__ import annotations

from detectron2.config import CfgNode


def add_mask_former_config(cfg: CfgNode) -> CfgNode:
    """Add MODEL.MASK_FORMER and the new keys of MODEL.SEM_SEG_HEAD, in place; set those that Detectron2 has.

    Returns:
        The same ``cfg``, for chaining.
    """
    _pixel_decoder_keys(cfg.MODEL.SEM_SEG_HEAD)
    cfg.MODEL.MASK_FORMER = CfgNode()
    _decoder_keys(cfg.MODEL.MASK_FORMER)
    _loss_keys(cfg.MODEL.MASK_FORMER)
    _inference_keys(cfg.MODEL.MASK_FORMER)
    return cfg


def _pixel_decoder_keys(head: CfgNode) -> None:
    # "Mask2FormerHead" | "UPerNetHead" | "LinearSegHead" (this project's), or Detectron2's "SemSegFPNHead".
    head.NAME = "Mask2FormerHead"
    head.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    head.NUM_CLASSES = 150
    # Width inside the pixel decoder (and inside UPerNetHead).
    head.CONVS_DIM = 256
    # Norm of the FPN's convolutions (LinearSegHead: of the backbone's maps, LN): as in Detectron2, "" for none.
    head.NORM = "GN"
    # The only one there is; Mask2Former's others give a message.
    head.PIXEL_DECODER_NAME = "MSDeformAttnPixelDecoder"
    # N: deformable encoder layers. Table 3 of the paper compares 1 and 6.
    head.TRANSFORMER_ENC_LAYERS = 6
    # Maps that the encoder works on; the finer ones of IN_FEATURES are added by an FPN.
    head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4", "res5"]
    # Sampling points per head and level in the encoder.
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS = 4
    # Not read, as in Mask2Former: the encoder has MASK_FORMER.NHEADS heads. Here so that Mask2Former's files load.
    head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = 8
    # Channels of the map whose product with a query's embedding is its mask.
    head.MASK_DIM = 256


def _decoder_keys(m: CfgNode) -> None:
    # The only one there is, and its input.
    m.TRANSFORMER_DECODER_NAME = "MultiScaleMaskedTransformerDecoder"
    m.TRANSFORMER_IN_FEATURE = "multi_scale_pixel_decoder"
    # M + 1, as Mask2Former counts: 10 is the paper's (9+1), 4 its (3+1). Predictions are made that many times.
    m.DEC_LAYERS = 10
    # Layers of MaskFormer's first version; Mask2Former has none.
    m.ENC_LAYERS = 0
    m.HIDDEN_DIM = 256
    m.NUM_OBJECT_QUERIES = 100
    # Heads of all attention, in the pixel decoder too.
    m.NHEADS = 8
    m.DIM_FEEDFORWARD = 2048
    # In the pixel decoder's encoder; the masked decoder has none.
    m.DROPOUT = 0.0
    m.PRE_NORM = False
    m.ENFORCE_INPUT_PROJ = False
    # Images are padded to multiples of this, in pixels (and of what the backbone wants).
    m.SIZE_DIVISIBILITY = 32


def _loss_keys(m: CfgNode) -> None:
    # Losses after every layer, not only after the last.
    m.DEEP_SUPERVISION = True
    # Weights of the losses, and of the same terms in the matching.
    m.CLASS_WEIGHT = 2.0
    m.MASK_WEIGHT = 5.0
    m.DICE_WEIGHT = 5.0
    # Weight of the class "no object" in the cross entropy.
    m.NO_OBJECT_WEIGHT = 0.1
    # Points per mask at which losses are computed: drawn OVERSAMPLE_RATIO times as many, a share of
    # IMPORTANCE_SAMPLE_RATIO being those where the prediction is least sure.
    m.TRAIN_NUM_POINTS = 12544
    m.OVERSAMPLE_RATIO = 3.0
    m.IMPORTANCE_SAMPLE_RATIO = 0.75


def _inference_keys(m: CfgNode) -> None:
    m.TEST = CfgNode()
    # Results per image: {"sem_seg": (K, H, W)}, and {"instances": ...} (TEST.DETECTIONS_PER_IMAGE of them).
    m.TEST.SEMANTIC_ON = True
    m.TEST.INSTANCE_ON = False
    # Must stay False: panoptic segmentation needs Mask2Former itself. The two thresholds are its own, and here so
    # that Mask2Former's files load.
    m.TEST.PANOPTIC_ON = False
    m.TEST.OVERLAP_THRESHOLD = 0.0
    m.TEST.OBJECT_MASK_THRESHOLD = 0.0
    # Bring masks to the output size before (True) or scores after (False) they are combined into classes.
    m.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = False
