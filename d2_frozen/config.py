"""Every config key that this project adds to Detectron2's, its meaning above its default."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode

# Imported by add_frozen_config: these modules register themselves in Detectron2's registries.
_REGISTERING = ("d2_frozen.backbone", "d2_frozen.neck", "d2_frozen.detection")
AddKeys = Callable[[CfgNode], Any]
# Of code outside of this project, by name.
_keys_of_others: dict[tuple[str, str], AddKeys] = {}


def add_frozen_config(cfg: CfgNode) -> CfgNode:
    """Add this project's keys to a Detectron2 config, in place, and register its models.

    In someone else's Detectron2 project, ``import d2_frozen; add_frozen_config(cfg)`` and
    ``MODEL.BACKBONE.NAME: build_frozen_backbone`` in the yaml are all that is needed.

    Returns:
        The same ``cfg``, for chaining.
    """
    _add_model_keys(cfg)
    _add_data_keys(cfg)
    _add_training_keys(cfg)
    for name in _REGISTERING:
        importlib.import_module(name)
    return cfg


def register_config(add_keys: AddKeys) -> AddKeys:
    """Keys of your own for every config that a command reads (train_net, predict, joint, ...); usable as a decorator.

    Registries are for classes; this is the same for keys: the module that registers a head also registers its keys.

    Args:
        add_keys: a function of the module that sets keys in the cfg it is given, in place, after this project's are
            there. Registered again (a notebook's cell), it takes the place of the one of that name.
    """
    _keys_of_others[add_keys.__module__, add_keys.__qualname__] = add_keys
    return add_keys


def add_keys_of_others(cfg: CfgNode) -> CfgNode:
    """What was given to :func:`register_config`, in place; returns ``cfg``."""
    for add_keys in _keys_of_others.values():
        add_keys(cfg)
    return cfg


def _add_model_keys(cfg: CfgNode) -> None:
    # What of the bottom-up network does not train: "all" (the paper's frozen setting), "none" (full fine-tuning), or
    # the last frozen stage: "stem" | "res2" | "res3" | "res4" (everything from the input up to and including it).
    # Read by MODEL.BACKBONE.NAME: build_frozen_backbone, for every bottom-up network; Detectron2's own names of
    # backbones read FREEZE_AT.
    cfg.MODEL.BACKBONE.FREEZE = "all"

    # True: trained layers that stand in a stack keep only their inputs, and compute again in backward: layers of BiFPN,
    # blocks of ResidualFPN, of seg_app's pixel decoder, of video heads, and of a timm network that trains. Same losses
    # and gradients from less memory and more time (docs/speed.md, "Less memory").
    cfg.MODEL.USE_ACT_CHECKPOINT = False

    cfg.MODEL.FROZEN = CfgNode()
    # Bottom-up network under the neck: any name in Detectron2's BACKBONE registry that gives a feature pyramid.
    cfg.MODEL.FROZEN.BOTTOM_UP = "build_timm_backbone"
    # Arithmetic of the frozen forward only: "fp32" | "bf16" | "fp16" | "int8" | "fp8" (linear layers in 8-bit
    # integers or floats, by torchao; fp8 from Ada and Hopper on, int8 slower than bf16 on CPU). Neck and heads follow
    # SOLVER.AMP.
    # Below fp32 it runs on weights of its own; on a GPU, the float32 originals then stay in the computer's memory.
    # docs/speed.md has times and errors of each.
    cfg.MODEL.FROZEN.PRECISION = "fp32"
    # Compile the frozen forward: Swin and SwinV2 on a GPU as one recorded graph for each image size, everything else by
    # torch.compile (on CPU it needs a C++ compiler). The first forwards take longer; docs/speed.md says how much.
    cfg.MODEL.FROZEN.COMPILE = False
    # False: checkpoints hold the trained part and the backbone's fingerprint. True: the whole model, in one file.
    cfg.MODEL.FROZEN.SAVE_FULL_MODEL = False

    # Feature cache: outputs of the frozen backbone on disk (docs/feature_cache.md). For MODEL.BACKBONE.FREEZE: all.
    cfg.MODEL.FROZEN.CACHE = CfgNode()
    # Folder of the cache, shared by any runs and processes; "": none. Training fills it, and reads what is there.
    cfg.MODEL.FROZEN.CACHE.DIR = ""
    # Augmented views per image: the n-th pass over the data takes view n mod VIEWS, whose augmentation is a function of
    # (CACHE.SEED, image, view). 0: every pass augments anew, and there can be no cache. Above 0 the backbone also runs
    # image by image, with DIR or without, so that a cache changes nothing but the time.
    cfg.MODEL.FROZEN.CACHE.VIEWS = 0
    # Of the views. Not SEED, so that runs of several SEEDs can share a cache.
    cfg.MODEL.FROZEN.CACHE.SEED = 0
    # What is stored: "fp32", "bf16", "fp16", or "auto": that of MODEL.FROZEN.PRECISION, which loses nothing. Features
    # that are computed are rounded alike, so that a loss does not depend on what is in the cache.
    cfg.MODEL.FROZEN.CACHE.DTYPE = "auto"
    # Upper limit of DIR in GiB; 0.0: the disk, less a reserve of 1 GiB. When it is reached, the rest is computed.
    cfg.MODEL.FROZEN.CACHE.MAX_GB = 0.0

    cfg.MODEL.TIMM = CfgNode()
    # Name of any timm model with a feature pyramid (strides 4, 8, 16, 32), or of a plain ViT; docs/backbones.md lists
    # what to use.
    # This project's own: swinv2_giant_window12_192 (SwinV2-G), and the small swinv2_pico_window8_256, whose weights
    # ship with the package.
    cfg.MODEL.TIMM.NAME = "swinv2_pico_window8_256"
    # Weights of the bottom-up network: "" (random), "hub" (timm's, downloaded), or a file: a path, a URL, or
    # d2_frozen://NAME for a file that ships with the package. Names of public Swin checkpoints are recognised
    # (docs/backbones.md). Shards: their index (.index.json), its folder, a pattern (g-*.pth), or names with commas.
    cfg.MODEL.TIMM.PRETRAINED = ""
    # Feature maps to expose: res2..res5 have strides 4, 8, 16, 32 pixels.
    cfg.MODEL.TIMM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # True: res5 passes through the network's own pretrained final norm (that in front of its classifier), where it has
    # one, cell by cell. The norm is then a part of the bottom-up network: frozen with it, and in its fingerprint.
    # Detection and segmentation take maps without it; video's heads have it. A plain ViT's map always has it.
    cfg.MODEL.TIMM.FINAL_NORM = False
    # Stochastic depth rate of the bottom-up network; acts on its trained part only.
    cfg.MODEL.TIMM.DROP_PATH_RATE = 0.0
    # Further arguments of timm.create_model, by timm's names, in a yaml: {embed_dim: 64, depths: [2, 2, 6, 2]}.
    cfg.MODEL.TIMM.ARGS = CfgNode(new_allowed=True)

    cfg.MODEL.NECK = CfgNode()
    # Neck on top of the bottom-up network: "FPN" | "ResidualFPN" | "BiFPN" | "SimpleFeaturePyramid" (ViTDet's, for
    # plain ViTs; the other necks on a plain ViT get res2..res5 from the same trained branches).
    # "none" gives the head res2..res5 (seg_app's heads have a neck inside). One of your own: its name in NECK_REGISTRY
    # of d2_frozen.neck (docs/library.md).
    # MODEL.BACKBONE.NAME: build_frozen_bottom_up reads none of it: the network's own maps, a plain ViT's "plain" too.
    # MODEL.FPN.{IN_FEATURES, OUT_CHANNELS, NORM} hold for each neck, FUSE_TYPE for the two FPNs.
    # BiFPN needs a norm (GN, BN, SyncBN): without one, the signal fades from layer to layer.
    cfg.MODEL.NECK.NAME = "BiFPN"

    cfg.MODEL.BIFPN = CfgNode()
    # Number of bidirectional layers. The paper's Figure 4 finds 5 (ImageNet-22K) to 9 (1K) best.
    cfg.MODEL.BIFPN.NUM_LAYERS = 5
    # Depthwise-separable 3x3 convolutions (EfficientDet) or plain ones.
    cfg.MODEL.BIFPN.SEPARABLE_CONV = True
    # How inputs of a node are weighted: "fast_normalized" | "softmax" | "sum" (EfficientDet, section 3.3).
    cfg.MODEL.BIFPN.FUSE_TYPE = "fast_normalized"

    cfg.MODEL.RESIDUAL_FPN = CfgNode()
    # Residual blocks (two 3x3 convolutions each) per pyramid level. The paper's Table 2 uses 4.
    cfg.MODEL.RESIDUAL_FPN.NUM_BLOCKS = 4

    _add_head_keys(cfg)


def _add_head_keys(cfg: CfgNode) -> None:
    # How FrozenRCNN thins out overlapping detections of one class: "nms" (Detectron2's), or Soft-NMS (arXiv
    # 1704.04503): "soft_nms_linear" (scores fall by 1 - IoU where IoU >= NMS_THRESH_TEST) | "soft_nms_gaussian" (by
    # exp(-IoU^2 / sigma)). For MODEL.ROI_HEADS.NAME StandardROIHeads, CascadeROIHeads and HTCROIHeads, and TEST.AUG.
    cfg.MODEL.ROI_HEADS.NMS_TYPE = "nms"
    # Sigma of "soft_nms_gaussian", above 0; the Soft-NMS paper's is 0.5.
    cfg.MODEL.ROI_HEADS.SOFT_NMS_SIGMA = 0.5
    # Detections whose score falls below it are dropped. SCORE_THRESH_TEST holds before, as always.
    cfg.MODEL.ROI_HEADS.SOFT_NMS_MIN_SCORE = 0.001

    # Hybrid Task Cascade (arXiv 1901.07518): MODEL.ROI_HEADS.NAME: HTCROIHeads. Stages, IoUs and box weights are those
    # of MODEL.ROI_BOX_CASCADE_HEAD; it needs MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG: True.
    cfg.MODEL.HTC = CfgNode()
    # One per stage, on its box and mask losses.
    cfg.MODEL.HTC.STAGE_LOSS_WEIGHTS = (1.0, 0.5, 0.25)
    # True: the mask branch of a stage gets the boxes that this stage has refined. False: those that it was given.
    cfg.MODEL.HTC.INTERLEAVED = True
    # True: the mask features of a stage go into the next one.
    cfg.MODEL.HTC.MASK_INFO_FLOW = True
    # The semantic branch: predicts a label map and adds its features to those of boxes and masks. Needs such maps in
    # the training data: field `sem_seg` of a DATASETS.REGISTER entry, "sem_seg_file_name" in records of your own.
    # Classes and ignored value are MODEL.SEM_SEG_HEAD.{NUM_CLASSES, IGNORE_VALUE}.
    cfg.MODEL.HTC.SEMANTIC_ON = False
    # The pyramid levels that it joins, and the stride in pixels at which it does.
    cfg.MODEL.HTC.SEMANTIC_IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.HTC.SEMANTIC_STRIDE = 8
    cfg.MODEL.HTC.SEMANTIC_NUM_CONVS = 4
    # MMDetection's weight; the HTC paper has 1.
    cfg.MODEL.HTC.SEMANTIC_LOSS_WEIGHT = 0.2


def _add_data_keys(cfg: CfgNode) -> None:
    # Own data without code; a list of entries such as
    #   - {name: nuts_train, type: coco_instances, json: PATH, images: DIR}
    # Relative paths are relative to DETECTRON2_DATASETS where that is set and the file exists there, else to the
    # working directory. `classes` (list or file) is optional; it must then name the data's categories.
    cfg.DATASETS.REGISTER = []
    # Bad records (broken image, box outside, empty segmentation ...): False stops before training with the list of
    # them; True leaves them out, counts and logs them, in training and evaluation (the data goes on as
    # OUTPUT_DIR/data/NAME.json). COCO train2017 itself has two boxes of zero height (cocoapi issue 355).
    cfg.DATASETS.SKIP_BAD = False
    # Image check before training: "full" (decode every image), "header" (does it open, and is its size that of the
    # json), "off", or "auto" ("full" for up to 5000 images per dataset, else "header").
    cfg.DATASETS.CHECK_IMAGES = "auto"

    # Train on a share of the images of each set in DATASETS.TRAIN (the paper's Table 6); test sets stay whole. A seed
    # names the same images everywhere, and 1 % of them is a part of 10 %; ids go to OUTPUT_DIR/data/NAME.subset.json.
    cfg.DATASETS.SUBSET = CfgNode()
    # Above 0.0, up to 100.0: all; 1 % is written 1.0, as any float key wants it. Of the images with objects, or of all
    # of them if DATALOADER.FILTER_EMPTY_ANNOTATIONS is False.
    cfg.DATASETS.SUBSET.PERCENT = 100.0
    # Any integer; independent of SEED, so that runs of several SEEDs can share their images.
    cfg.DATASETS.SUBSET.SEED = 0

    # Training augmentation: "resize_shortest_edge" (Detectron2's, by INPUT.MIN_SIZE_TRAIN), or "scale_crop" (the
    # paper's section 3.3: random resize, then a random square crop; Simple Copy-Paste's large-scale jittering).
    # Test resize follows: "resize_shortest_edge" by INPUT.MIN_SIZE_TEST; "scale_crop" by SCALE_CROP.TEST_RESIZE.
    cfg.INPUT.AUGMENTATION = "resize_shortest_edge"
    # Training images: decode JPEGs at 1/2, 1/4 or 1/8 where they become smaller still, and resize nothing but what the
    # crop keeps, which changes the rounding. False: Detectron2's pixels, bit for bit, also made for the crop as far as
    # that goes. docs/own_data.md says how they differ, and what it saves.
    cfg.INPUT.FAST_READING = False
    cfg.INPUT.SCALE_CROP = CfgNode()
    # Side of the square crop in pixels; smaller images are padded at the right and bottom.
    cfg.INPUT.SCALE_CROP.SIZE = 1024
    # Range of the random scale, relative to the size at which the image just fits the square.
    cfg.INPUT.SCALE_CROP.MIN_SCALE = 0.1
    cfg.INPUT.SCALE_CROP.MAX_SCALE = 2.0
    # At test time: "long_side" (to SIZE), "square" (the same, then padded to SIZE x SIZE inside the model, as images
    # are in training; ViTDet's way), or "shortest_edge" (by INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST, 800 and 1333).
    cfg.INPUT.SCALE_CROP.TEST_RESIZE = "long_side"


def _add_training_keys(cfg: CfgNode) -> None:
    # "SGD" | "ADAMW". AdamW uses SOLVER.BASE_LR, WEIGHT_DECAY, WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS, BIAS_LR_FACTOR.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Periodic checkpoints that stay: the newest so many, beside model_final.pth. 0: all of them, as in Detectron2.
    cfg.SOLVER.CHECKPOINTS_KEPT = 0
    # A metric of metrics.json, such as "segm/AP", "sem_seg/mIoU", "video/top1" (with several test sets
    # "parts_val/segm/AP"): model_best.pth is the checkpoint with the highest one of all evaluations (TEST.EVAL_PERIOD,
    # and the last). "": none.
    cfg.SOLVER.BEST_CHECKPOINT = ""
    # Weight decay of nn.Embedding: the queries of a masked decoder.
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    # LR_SCHEDULER_NAME may also be "WarmupPolyLR": the rate falls by (1 - progress) ** POLY_LR_POWER.
    cfg.SOLVER.POLY_LR_POWER = 0.9
    # For a bottom-up network that trains, or part of it (MODEL.BACKBONE.FREEZE other than "all"): its learning rate
    # relative to BASE_LR, and the factor from each of its blocks to the one before (layer-wise decay: layer k of L
    # gets LAYER_DECAY ** (L + 1 - k), the stem being layer 0). 1.0: no difference. Swin and ViT users take 0.7 to 0.9.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    cfg.SOLVER.LAYER_DECAY = 1.0

    # TEST.AUG.{ENABLED, MIN_SIZES, MAX_SIZE, FLIP} are Detectron2's: after training and with --eval-only a second
    # evaluation on several sizes, its metrics named *_TTA. With INPUT.AUGMENTATION scale_crop the sizes are those of
    # the long side, as SCALE_CROP.SIZE is (of the short edge with TEST_RESIZE shortest_edge).

    # Pictures in OUTPUT_DIR/inference/predictions_*.jpg after training: truth beside prediction. 0 for none.
    cfg.TEST.PICTURES = 12
