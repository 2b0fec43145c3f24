"""Which frames of a video make a clip? A function of the plan and of the video's frame times; nothing else is drawn.

Dense: T frames at a fixed step from one start. Uniform: the video in T equal parts, one frame of each (TSN,
arXiv:1608.00859). Training takes one clip at a random place; testing takes clips that are spread evenly.

Without ``fps``, steps count coded frames, as the published Kinetics protocols do, whatever the video's rate is,
constant or not. With ``fps``, they count frames of a video at this rate: at each moment, the frame that is shown then.
A video that is too short shows its last frame on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SamplingPlan:
    """
    Args:
        kind: "dense" or "uniform".
        frames: T.
        stride: step between frames of a dense clip.
        fps: rate that steps count at; 0 counts coded frames.
        clips: K, spread evenly. With ``draws`` it is 1.
        draws: numbers in [0, 1) that place a training clip: one if dense, T if uniform. Empty in testing.
    Raises:
        ValueError: unknown kind, a count below 1, negative fps, or a wrong number of draws.
    """

    kind: str = "dense"
    frames: int = 16
    stride: int = 4
    fps: float = 0.0
    clips: int = 1
    draws: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("dense", "uniform"):
            raise ValueError(f"sampling is {self.kind!r}; choose dense or uniform.")
        if min(self.frames, self.stride, self.clips) < 1 or self.fps < 0:
            raise ValueError(
                f"{self.frames} frames, stride {self.stride}, {self.clips} clips, {self.fps} fps: counts are at "
                "least 1, and fps is 0 or more (VIDEO.NUM_FRAMES, STRIDE, TEST.CLIPS, FPS)."
            )
        if self.draws and (len(self.draws) != self.draws_needed or self.clips != 1):
            raise ValueError(
                f"a random {self.kind} clip takes {self.draws_needed} draws, not {len(self.draws)}."
            )

    @property
    def draws_needed(self) -> int:
        return 1 if self.kind == "dense" else self.frames

    def drawn(self, random: np.random.Generator) -> SamplingPlan:
        """The same plan for one training clip at a random place."""
        draws = tuple(float(value) for value in random.random(self.draws_needed))
        return SamplingPlan(self.kind, self.frames, self.stride, self.fps, 1, draws)

    def indices(self, times_s: np.ndarray) -> np.ndarray:
        """Frame numbers.

        Args:
            times_s: (N,) ascending, N >= 1: when each frame is shown, from 0.
        Returns:
            (K, T) int64 in [0, N).
        """
        assert len(times_s), "a video has at least one frame"
        if not self.fps:
            return np.minimum(self._steps(len(times_s)), len(times_s) - 1)
        usual = float(np.median(np.diff(times_s))) if len(times_s) > 1 else 0.0
        count = max(1, int(round((times_s[-1] + usual) * self.fps)))
        moments = (np.minimum(self._steps(count), count - 1) + 0.5) / self.fps
        # Readers differ in the last digits of a time.
        return np.clip(np.searchsorted(times_s, moments + 1e-4, side="right") - 1, 0, len(times_s) - 1)

    def _steps(self, count: int) -> np.ndarray:
        """(K, T) for a video of ``count`` frames; may go beyond its end."""
        if self.kind == "dense":
            places = max(0, count - self.stride * (self.frames - 1) - 1) + 1  # possible starts
            where = np.array(self.draws) if self.draws else (np.arange(self.clips) + 0.5) / self.clips
            return np.floor(where * places).astype(np.int64)[:, None] + self.stride * np.arange(self.frames)
        within = np.array([self.draws]) if self.draws else (np.arange(self.clips)[:, None] + 0.5) / self.clips
        return np.floor((np.arange(self.frames) + within) * count / self.frames).astype(np.int64)
