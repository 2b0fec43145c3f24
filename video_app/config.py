"""Every config key of video beside those of the heads (models/config.py) and of d2_frozen."""

from __future__ import annotations

from d2_frozen.config import add_frozen_config
from detectron2.config import CfgNode


def add_video_config(cfg: CfgNode) -> CfgNode:
    """Add the keys of d2_frozen, of the heads and of this app, in place; register models, datasets, entry types.

    Returns:
        The same ``cfg``, for chaining.
    """
    # Imported here: a config of another task must not load video.
    import video_app.data  # noqa: F401
    from video_app.models import add_video_head_config

    add_video_head_config(add_frozen_config(cfg))
    cfg.MODEL.META_ARCHITECTURE = "FrozenVideoClassifier"
    # Videos do not tell their sizes before they are read.
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.VIDEO = CfgNode()
    _add_reading_keys(cfg.VIDEO)
    _add_clip_keys(cfg.VIDEO)
    return cfg


def _add_reading_keys(video: CfgNode) -> None:
    # What reads video files: "decord", "pyav", "torchcodec" (needs an installed FFmpeg), or "auto": of those that are
    # installed the first that is right for the file (docs/video_data.md). Where it fails on a file, the next one tries.
    video.READER = "auto"
    # Seconds for one file and one reader; then its process is killed and the other reader tries.
    video.TIMEOUT = 30.0
    # False: a file that no reader can read is noted in OUTPUT_DIR/bad_clips.txt; in training another takes its place,
    # in testing it counts as wrong. True: it ends the run.
    video.STRICT = False
    # A decoding process is replaced after so many files, against readers that leak.
    video.RECYCLE_AFTER = 1000
    # Frames per second of folders of pictures.
    video.FOLDER_FPS = 30.0


def _add_clip_keys(video: CfgNode) -> None:
    # "dense": NUM_FRAMES frames, each STRIDE after the one before. "uniform": the video in NUM_FRAMES equal parts, one
    # frame of each; STRIDE plays no part.
    video.SAMPLING = "dense"
    video.NUM_FRAMES = 16
    video.STRIDE = 4
    # 0: strides count coded frames, whatever the video's rate (the published protocols). Above 0: they count frames of
    # a video at this rate, by the time at which frames are shown; matters for variable frame rates and mixed sources.
    video.FPS = 0.0
    # Shorter side in pixels after decoding.
    video.SHORT_SIDE = 256
    # Side of the square that the network sees, in pixels.
    video.CROP_SIZE = 224
    # Training crop, the same for all frames of a clip: "random_resized" (area and aspect ratio drawn), "multi_scale"
    # (squares of the shorter side x one of CROP_SCALES, at five places), "random" (one size) or "centre".
    video.TRAIN_CROP = "random_resized"
    # Share of the area that random_resized covers, from and to; and its aspect ratios.
    video.CROP_AREA = (0.4, 1.0)
    video.CROP_ASPECT = (0.75, 4.0 / 3.0)
    video.CROP_SCALES = (1.0, 0.875, 0.75, 0.66)
    # Mirror half of the training clips. Set it to False where left and right are in the classes.
    video.FLIP = True

    # Views of a test video: clips, evenly spaced in time, x crops along the longer side (1: the centre).
    video.TEST = CfgNode()
    video.TEST.CLIPS = 4
    video.TEST.CROPS = 3
    # Shorter side in pixels at test, of which views show CROP_SIZE, from the middle; 0: CROP_SIZE, all of it.
    video.TEST.SHORT_SIDE = 0
