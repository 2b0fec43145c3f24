"""Dataset record -> sample: what the loader of d2_frozen calls for each video.

In: {"file_name", "label", "video_id"}.
Out: {"video": (V, T, 3, S, S) uint8 tensor in INPUT.FORMAT's channel order, "label", "video_id", "file_name",
"frame_indices": (K, T) list}. V is 1 in training, clips x crops in testing, the crops of a clip side by side.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from d2_frozen.caching import SLOT, FeatureCache, Slot
from d2_frozen.data.loader import require_reachable
from detectron2.config import CfgNode
from video_app.clips.bad_clips import BadClips
from video_app.clips.crops import TrainCrop, view_crops
from video_app.clips.decoder import BadClip, ClipDecoder, DecodedClip, VideoReading
from video_app.clips.sampling import SamplingPlan

logger = logging.getLogger(__name__)


class ClipMapper:
    """Decodes, samples and crops. Every draw is from numpy's global generator, which the loader seeds by (seed,
    position in the sample stream), once at the start.

    A bad file is noted in ``bad_clips`` and then: in training the answer is None, for which the loader draws another
    video; in testing it is a sample without "video" but with "bad", the reason, which counts as wrong.

    While ``cache`` is set, training samples get a slot in it, and a video whose features are there is not read: its
    "video" is zeros of the right size that take no memory.
    """

    cache: FeatureCache | None = None

    def __init__(
        self,
        reading: VideoReading,
        plan: SamplingPlan,
        bad_clips: BadClips,
        *,
        size_px: int,
        train_crop: TrainCrop | None = None,
        num_crops: int = 1,
        bgr: bool = False,
        strict: bool = False,
    ):
        """
        Args:
            train_crop: None in testing; then ``plan.clips`` clips x ``num_crops`` crops are taken.
            size_px: side of the square views.
            strict: raise on a bad file.
        Raises:
            ValueError: a number of crops that cannot be.
        """
        view_crops(size_px, size_px, num_crops, size_px)  # else it would be told by the first video of a test
        self.reading = reading
        self.decoder = ClipDecoder(reading)
        self.plan = plan
        self.bad_clips = bad_clips
        self.size_px = size_px
        self.train_crop = train_crop
        self.num_crops = num_crops
        self.bgr = bgr
        self.strict = strict

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool) -> ClipMapper:
        """
        Raises:
            ValueError: a value of VIDEO that cannot be, named.
        """
        video = cfg.VIDEO
        if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}; video takes RGB or BGR.")
        crop = TrainCrop(
            video.TRAIN_CROP,
            video.CROP_SIZE,
            tuple(video.CROP_AREA),
            tuple(video.CROP_ASPECT),
            tuple(video.CROP_SCALES),
            video.FLIP,
        )
        reading = VideoReading(
            reader=video.READER,
            short_side_px=video.SHORT_SIDE if is_train else video.TEST.SHORT_SIDE or video.CROP_SIZE,
            timeout_s=video.TIMEOUT,
            folder_fps=video.FOLDER_FPS,
            recycle_after=video.RECYCLE_AFTER,
        )
        clips = 1 if is_train else video.TEST.CLIPS
        return cls(
            reading,
            SamplingPlan(video.SAMPLING, video.NUM_FRAMES, video.STRIDE, video.FPS, clips),
            BadClips(cfg.OUTPUT_DIR),
            size_px=video.CROP_SIZE,
            train_crop=crop if is_train else None,
            num_crops=video.TEST.CROPS,
            bgr=cfg.INPUT.FORMAT == "BGR",
            strict=video.STRICT,
        )

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """
        Raises:
            BadClip: with ``strict``, for a file that cannot be read.
            OSError: for a file system that is away.
        """
        # Both are drawn before the file is read, so that a draw does not depend on what is in it.
        drawn = np.random.randint(0, 2**31, size=4)
        random = np.random.default_rng(drawn)
        plan = self.plan.drawn(random) if self.train_crop is not None else self.plan
        path = record["file_name"]
        reason = self.bad_clips.reason(path)
        slot = self._slot(path, drawn) if reason is None else None
        if slot is not None and slot.place is not None and not self.cache.wants_pixels:
            return {**_about(record), **dict(slot.about or {}), "video": self._placeholder(), SLOT: slot}
        if reason is None:
            try:
                video, clip = self.views(path, plan, random)
            except BadClip as err:
                require_reachable(path)
                reason = str(err)
        if reason is not None:
            return self._bad(record, reason)
        sample = {**_about(record), "video": video, "frame_indices": clip.indices.tolist()}
        if slot is not None:
            sample[SLOT] = slot._replace(about={"frame_indices": sample["frame_indices"]})
        return sample

    def _slot(self, path: str, drawn: np.ndarray) -> Slot | None:
        """Frames and crop follow from the file, these settings, and the numbers that were drawn."""
        if self.cache is None or self.train_crop is None:
            return None
        how = (self.reading.reader, self.reading.short_side_px, self.reading.folder_fps)
        try:
            return self.cache.look_up(path, [how, self.plan, self.train_crop, self.size_px, self.bgr, drawn])
        except OSError:
            return None  # it is not there, which is told when it is read

    def _placeholder(self) -> torch.Tensor:
        zero = torch.zeros((), dtype=torch.uint8)
        return zero.expand(1, self.plan.frames, 3, self.size_px, self.size_px)

    def recipe(self) -> dict[str, Any]:
        """What decides the samples: not where bad files are noted, nor the process that decodes."""
        others = ("bad_clips", "decoder")
        return {"reading": self.decoder.reading, **{k: v for k, v in vars(self).items() if k not in others}}

    def views(
        self, path: str, plan: SamplingPlan, random: np.random.Generator
    ) -> tuple[torch.Tensor, DecodedClip]:
        """(V, T, 3, S, S) uint8 views of a file, and what they were made of; ``random`` places training crops.

        Raises:
            BadClip: it cannot be read.
        """
        clip = self.decoder.read(path, plan)
        if clip.fault:
            logger.warning("%s: %s read it; %s", path, clip.reader, clip.fault)
        height, width = clip.frames.shape[2:4]
        if self.train_crop is not None:
            crops = [self.train_crop.draw(height, width, random)]
        else:
            crops = list(view_crops(height, width, self.num_crops, self.size_px))
        views = np.stack([crop.of(frames, self.size_px) for frames in clip.frames for crop in crops])
        if self.bgr:
            views = views[..., ::-1]
        return torch.from_numpy(np.ascontiguousarray(views.transpose(0, 1, 4, 2, 3))), clip

    def why_none(self, record: dict[str, Any]) -> str:
        """For the error of a loader that has found no other video either."""
        path = record["file_name"]
        return (
            f"none of these videos can be read, the last being {path}: {self.bad_clips.reason(path)}. "
            f"{self.bad_clips.path} lists all; delete lines there to try files again."
        )

    def _bad(self, record: dict[str, Any], reason: str) -> dict[str, Any] | None:
        path = record["file_name"]
        if self.strict:
            raise BadClip(f"{path}: {reason}. Correct it, or set VIDEO.STRICT False to go on without it.")
        if self.bad_clips.reason(path) is None:
            self.bad_clips.add(path, reason)
            logger.warning("%s cannot be read: %s. Noted in %s.", path, reason, self.bad_clips.path)
        return None if self.train_crop is not None else {**_about(record), "bad": reason}


def _about(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("file_name", "label", "video_id")}
