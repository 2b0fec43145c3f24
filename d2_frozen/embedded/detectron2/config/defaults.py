"""Every config key of Detectron2 0.6 with its default; the meaning and unit stand beside it.

One table per node. Keys of heads outside the embedded subset (keypoints, RetinaNet, panoptic) are here too,
so that any Detectron2 yaml can be read; building such a head is what raises.
"""

from __future__ import annotations

from detectron2.config.config import CfgNode

# Scale of the four box deltas (dx, dy, dw, dh); shared, so that a dump shows one table entry for equal ones.
_UNIT_DELTAS = (1.0, 1.0, 1.0, 1.0)
_ROI_DELTAS = (10.0, 10.0, 5.0, 5.0)

_BACKBONE = {
    "NAME": "build_resnet_backbone",  # entry of the BACKBONE registry
    "FREEZE_AT": 2,  # stages that do not train: 0 none, 1 the stem, 2 stem and res2, ...
}

_RESNETS = {
    "DEPTH": 50,  # 18, 34, 50, 101 or 152 layers
    "OUT_FEATURES": ["res4"],  # maps to hand out: "stem", "res2" ... "res5", "linear"
    "NORM": "FrozenBN",  # any name get_norm knows
    "NUM_GROUPS": 1,  # above 1: ResNeXt
    "WIDTH_PER_GROUP": 64,  # bottleneck channels of one group in res2
    "STRIDE_IN_1X1": True,  # stride 2 in the 1x1 (MSRA weights) or in the 3x3 convolution (torchvision)
    "STEM_OUT_CHANNELS": 64,
    "RES2_OUT_CHANNELS": 256,  # doubles with each stage; 64 for depths 18 and 34
    "RES5_DILATION": 1,  # 1 or 2; 2 keeps res5 at stride 16
    "DEFORM_ON_PER_STAGE": [False, False, False, False],  # deformable 3x3 convolutions in res2 ... res5
    "DEFORM_MODULATED": False,  # with a learned mask (version 2)
    "DEFORM_NUM_GROUPS": 1,
}

_FPN = {
    "IN_FEATURES": [],  # bottom-up maps, finest first
    "OUT_CHANNELS": 256,
    "NORM": "",
    "FUSE_TYPE": "sum",  # how lateral and top-down maps meet: "sum" | "avg"
}

_ANCHOR_GENERATOR = {
    "NAME": "DefaultAnchorGenerator",
    "SIZES": [[32, 64, 128, 256, 512]],  # square root of the area in pixels; one list per map, or one for all
    "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],  # height / width; per map like SIZES
    "ANGLES": [[-90, 0, 90]],  # degrees, rotated anchors only
    "OFFSET": 0.0,  # of the first anchor's centre, in strides: 0 or 0.5
}

_RPN = {
    "HEAD_NAME": "StandardRPNHead",
    "IN_FEATURES": ["res4"],
    "CONV_DIMS": [-1],  # channels of the hidden convolutions; -1: as the input
    "BOUNDARY_THRESH": -1,  # pixels an anchor may stick out and still be used; negative: no limit
    # An anchor is background below the first IoU, foreground from the second on, not used between them.
    "IOU_THRESHOLDS": [0.3, 0.7],
    "IOU_LABELS": [0, -1, 1],
    "BATCH_SIZE_PER_IMAGE": 256,  # anchors sampled for the loss
    "POSITIVE_FRACTION": 0.5,  # at most this part of them foreground
    "BBOX_REG_LOSS_TYPE": "smooth_l1",  # "smooth_l1" | "giou" | "diou" | "ciou"
    "BBOX_REG_LOSS_WEIGHT": 1.0,
    "BBOX_REG_WEIGHTS": _UNIT_DELTAS,
    "SMOOTH_L1_BETA": 0.0,  # where the loss turns from quadratic to linear; 0: plain L1
    "LOSS_WEIGHT": 1.0,
    # Boxes kept before NMS (per map) and after it (all maps of an image).
    "PRE_NMS_TOPK_TRAIN": 12000,
    "PRE_NMS_TOPK_TEST": 6000,
    "POST_NMS_TOPK_TRAIN": 2000,
    "POST_NMS_TOPK_TEST": 1000,
    "NMS_THRESH": 0.7,  # IoU
}

_ROI_HEADS = {
    "NAME": "Res5ROIHeads",
    "NUM_CLASSES": 80,  # foreground classes; background is one more
    "IN_FEATURES": ["res4"],
    "IOU_THRESHOLDS": [0.5],
    "IOU_LABELS": [0, 1],
    "BATCH_SIZE_PER_IMAGE": 512,  # proposals sampled for the loss
    "POSITIVE_FRACTION": 0.25,
    "SCORE_THRESH_TEST": 0.05,  # weaker detections are dropped
    "NMS_THRESH_TEST": 0.5,  # IoU, within a class
    "PROPOSAL_APPEND_GT": True,  # true boxes count as proposals during training
}

_ROI_BOX_HEAD = {
    "NAME": "",
    "BBOX_REG_LOSS_TYPE": "smooth_l1",  # as for the RPN
    "BBOX_REG_LOSS_WEIGHT": 1.0,
    "BBOX_REG_WEIGHTS": _ROI_DELTAS,
    "SMOOTH_L1_BETA": 0.0,
    "POOLER_RESOLUTION": 14,  # cells per side
    "POOLER_SAMPLING_RATIO": 0,  # samples per cell and axis; 0: as many as the box needs
    "POOLER_TYPE": "ROIAlignV2",  # V2 is shifted by half a pixel, as it should be
    "NUM_FC": 0,
    "FC_DIM": 1024,
    "NUM_CONV": 0,
    "CONV_DIM": 256,
    "NORM": "",  # of the convolutions
    "CLS_AGNOSTIC_BBOX_REG": False,  # one box for all classes instead of one per class
    "TRAIN_ON_PRED_BOXES": False,  # refined boxes as proposals of the later heads
    "USE_FED_LOSS": False,  # federated loss over sampled classes (CenterNet2); needs sigmoid
    "USE_SIGMOID_CE": False,
    "FED_LOSS_FREQ_WEIGHT_POWER": 0.5,
    "FED_LOSS_NUM_CLASSES": 50,
}

# Three stages, each with its own foreground IoU and delta scale.
_ROI_BOX_CASCADE_HEAD = {
    "IOUS": (0.5, 0.6, 0.7),
    "BBOX_REG_WEIGHTS": (_ROI_DELTAS, (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)),
}

_ROI_MASK_HEAD = {
    "NAME": "MaskRCNNConvUpsampleHead",
    "NUM_CONV": 0,
    "CONV_DIM": 256,
    "NORM": "",
    "CLS_AGNOSTIC_MASK": False,
    "POOLER_RESOLUTION": 14,  # the mask has twice as many cells
    "POOLER_SAMPLING_RATIO": 0,
    "POOLER_TYPE": "ROIAlignV2",
}

_ROI_KEYPOINT_HEAD = {
    "NAME": "KRCNNConvDeconvUpsampleHead",
    "NUM_KEYPOINTS": 17,  # those of COCO's person
    "CONV_DIMS": (512,) * 8,
    "POOLER_RESOLUTION": 14,
    "POOLER_SAMPLING_RATIO": 0,
    "POOLER_TYPE": "ROIAlignV2",
    "MIN_KEYPOINTS_PER_IMAGE": 1,  # images with fewer are left out
    "NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": True,
    "LOSS_WEIGHT": 1.0,
}

_SEM_SEG_HEAD = {
    "NAME": "SemSegFPNHead",
    "IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "NUM_CLASSES": 54,  # COCO stuff, and one for all things
    "IGNORE_VALUE": 255,  # label without loss
    "CONVS_DIM": 128,
    "COMMON_STRIDE": 4,  # pixels; where all maps are added up
    "NORM": "GN",
    "LOSS_WEIGHT": 1.0,
}

_PANOPTIC_FPN = {
    "INSTANCE_LOSS_WEIGHT": 1.0,
    "COMBINE": {
        "ENABLED": True,
        "OVERLAP_THRESH": 0.5,
        "STUFF_AREA_LIMIT": 4096,  # pixels
        "INSTANCES_CONFIDENCE_THRESH": 0.5,
    },
}

_RETINANET = {
    "NUM_CLASSES": 80,
    "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
    "NUM_CONVS": 4,
    "NORM": "",
    "IOU_THRESHOLDS": [0.4, 0.5],
    "IOU_LABELS": [0, -1, 1],
    "PRIOR_PROB": 0.01,  # foreground score at the start
    "SCORE_THRESH_TEST": 0.05,
    "TOPK_CANDIDATES_TEST": 1000,  # per map, before NMS
    "NMS_THRESH_TEST": 0.5,
    "BBOX_REG_WEIGHTS": _UNIT_DELTAS,
    "BBOX_REG_LOSS_TYPE": "smooth_l1",
    "SMOOTH_L1_LOSS_BETA": 0.1,
    "FOCAL_LOSS_GAMMA": 2.0,
    "FOCAL_LOSS_ALPHA": 0.25,
}

_MODEL = {
    "META_ARCHITECTURE": "GeneralizedRCNN",  # entry of the META_ARCH registry
    "DEVICE": "cuda",  # "cuda", "cuda:1", "cpu", ...
    "WEIGHTS": "",  # path or URL to start from; "": random
    # Per channel, in the order of INPUT.FORMAT and in grey levels (0..255). The std is 1 because the MSRA
    # weights have it folded in.
    "PIXEL_MEAN": [103.53, 116.28, 123.675],
    "PIXEL_STD": [1.0, 1.0, 1.0],
    "MASK_ON": False,
    "KEYPOINT_ON": False,
    "LOAD_PROPOSALS": False,  # boxes from DATASETS.PROPOSAL_FILES_* instead of an RPN
    "PROPOSAL_GENERATOR": {
        "NAME": "RPN",  # or "PrecomputedProposals"
        "MIN_SIZE": 0,  # pixels; boxes with a shorter side are dropped
    },
    "BACKBONE": _BACKBONE,
    "RESNETS": _RESNETS,
    "FPN": _FPN,
    "ANCHOR_GENERATOR": _ANCHOR_GENERATOR,
    "RPN": _RPN,
    "ROI_HEADS": _ROI_HEADS,
    "ROI_BOX_HEAD": _ROI_BOX_HEAD,
    "ROI_BOX_CASCADE_HEAD": _ROI_BOX_CASCADE_HEAD,
    "ROI_MASK_HEAD": _ROI_MASK_HEAD,
    "ROI_KEYPOINT_HEAD": _ROI_KEYPOINT_HEAD,
    "SEM_SEG_HEAD": _SEM_SEG_HEAD,
    "PANOPTIC_FPN": _PANOPTIC_FPN,
    "RETINANET": _RETINANET,
}

_INPUT = {
    "FORMAT": "BGR",  # channel order of the model's input, or a PIL mode
    "MASK_FORMAT": "polygon",  # "polygon" | "bitmask"
    # Shorter side in pixels: one of MIN_SIZE_TRAIN ("choice"), or between its two values ("range"); 0 at test
    # time leaves images as they are. The longer side never exceeds MAX_SIZE_*.
    "MIN_SIZE_TRAIN": (800,),
    "MIN_SIZE_TRAIN_SAMPLING": "choice",
    "MAX_SIZE_TRAIN": 1333,
    "MIN_SIZE_TEST": 800,
    "MAX_SIZE_TEST": 1333,
    "RANDOM_FLIP": "horizontal",  # "horizontal" | "vertical" | "none"
    "CROP": {
        "ENABLED": False,
        "TYPE": "relative_range",  # "relative" | "relative_range" | "absolute" | "absolute_range"
        "SIZE": [0.9, 0.9],  # height, width; parts of the image or pixels, as TYPE says
    },
}

_DATASETS = {
    "TRAIN": (),  # names in DatasetCatalog; several are concatenated
    "TEST": (),
    # One file of precomputed proposals per dataset, with LOAD_PROPOSALS; the best TOPK boxes are used.
    "PROPOSAL_FILES_TRAIN": (),
    "PROPOSAL_FILES_TEST": (),
    "PRECOMPUTED_PROPOSAL_TOPK_TRAIN": 2000,
    "PRECOMPUTED_PROPOSAL_TOPK_TEST": 1000,
}

_DATALOADER = {
    "NUM_WORKERS": 4,  # processes
    "SAMPLER_TRAIN": "TrainingSampler",  # or RepeatFactorTrainingSampler, RandomSubsetTrainingSampler, ...
    "ASPECT_RATIO_GROUPING": True,  # wide images with wide ones, tall with tall
    "FILTER_EMPTY_ANNOTATIONS": True,  # train without images that have no objects
    "REPEAT_THRESHOLD": 0.0,  # part of the images below which a class is repeated (LVIS)
    "REPEAT_SQRT": True,
}

_SOLVER = {
    "IMS_PER_BATCH": 16,  # images per step over all workers
    "MAX_ITER": 40000,  # steps
    "REFERENCE_WORLD_SIZE": 0,  # workers the schedule was made for; others scale it linearly; 0: never
    "BASE_LR": 0.001,
    "BASE_LR_END": 0.0,  # of the cosine schedule
    "BIAS_LR_FACTOR": 1.0,
    "MOMENTUM": 0.9,
    "NESTEROV": False,
    "WEIGHT_DECAY": 0.0001,
    "WEIGHT_DECAY_NORM": 0.0,  # parameters of normalisation layers
    "WEIGHT_DECAY_BIAS": None,  # None: as WEIGHT_DECAY
    "LR_SCHEDULER_NAME": "WarmupMultiStepLR",  # or "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
    "STEPS": (30000,),  # iterations at which the rate is multiplied by GAMMA
    "GAMMA": 0.1,
    "NUM_DECAYS": 3,  # equal parts of "WarmupStepWithFixedGammaLR"
    "WARMUP_ITERS": 1000,
    "WARMUP_FACTOR": 0.001,  # first rate, relative to BASE_LR
    "WARMUP_METHOD": "linear",  # "linear" | "constant"
    "RESCALE_INTERVAL": False,  # fit the schedule between warm-up and end instead of cutting it
    "CHECKPOINT_PERIOD": 5000,  # steps
    "AMP": {"ENABLED": False},  # automatic mixed precision
    "CLIP_GRADIENTS": {
        "ENABLED": False,
        "CLIP_TYPE": "value",  # "value" each element, "norm" each parameter, "full_model" all together
        "CLIP_VALUE": 1.0,
        "NORM_TYPE": 2.0,  # p of the norm; float("inf") is allowed
    },
}

_TEST = {
    "EVAL_PERIOD": 0,  # steps; 0: at the end only
    "DETECTIONS_PER_IMAGE": 100,
    "EXPECTED_RESULTS": [],  # [dataset, metric, wanted, tolerance] rows that must hold after evaluation
    "KEYPOINT_OKS_SIGMAS": [],  # [] : those of COCO
    "AUG": {
        "ENABLED": False,
        "FLIP": True,
        "MIN_SIZES": (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),  # shorter sides, pixels
        "MAX_SIZE": 4000,
    },
    "PRECISE_BN": {
        "ENABLED": False,
        "NUM_ITER": 200,  # batches for the statistics
    },
}

_C = CfgNode(
    {
        "VERSION": 2,  # of the key names; checked when a file is merged
        "OUTPUT_DIR": "./output",
        "SEED": -1,  # negative: not seeded
        "CUDNN_BENCHMARK": False,  # pays off for fixed image sizes only
        "FLOAT32_PRECISION": "",  # on GPUs, "" | "highest" | "high" | "medium": torch.set_float32_matmul_precision
        "VIS_PERIOD": 0,  # steps between pictures of the training in TensorBoard; 0: none
        "GLOBAL": {"HACK": 1.0},  # free for quick experiments; nothing reads it
        "MODEL": _MODEL,
        "INPUT": _INPUT,
        "DATASETS": _DATASETS,
        "DATALOADER": _DATALOADER,
        "SOLVER": _SOLVER,
        "TEST": _TEST,
    }
)
