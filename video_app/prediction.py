"""How a video head predicts a file: the whole of it, by the views of the evaluation, then clip after clip.

A clip is as long as those of training (NUM_FRAMES x STRIDE frames); clips follow each other without gap, and the last
one ends with the video. Uniform sampling knows whole videos only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from d2_frozen.lettering import put_text, text_width
from d2_frozen.tasks import Classes, fill_class_count
from detectron2.config import CfgNode
from video_app.clips.mapper import ClipMapper
from video_app.clips.sampling import SamplingPlan

_NAMED = 5  # classes in a record
_DRAWN = 3


class VideoPrediction:
    """See :class:`d2_frozen.tasks.ClipPrediction`. Results are ``{"scores": (K,)}``.

    Args:
        cfg: of the head.
        classes: names; without them, class numbers counted from 0.
    """

    def __init__(self, cfg: CfgNode, classes: Classes | None) -> None:
        count = fill_class_count(cfg.MODEL.VIDEO_HEAD, classes, "MODEL.VIDEO_HEAD.NUM_CLASSES")
        self.classes = classes or Classes([str(k) for k in range(count)], list(range(count)))
        self._mapper = ClipMapper.from_config(cfg, is_train=False)

    def clips(self, path: Path) -> Iterator[tuple[float, float, dict[str, Any]]]:
        """The whole video, with "whole" in its input; then its clips, where there is more than one.

        Raises:
            BadClip: no reader can read it.
        """
        plan, no_draws = self._mapper.plan, np.random.default_rng(0)
        views, decoded = self._mapper.views(str(path), plan, no_draws)
        rate = plan.fps or decoded.fps or 1.0
        count = round(decoded.duration_s * rate) if plan.fps else decoded.held
        yield 0.0, decoded.duration_s, {"video": views, "whole": True}
        for start, placed in clip_plans(plan, count):
            views, _ = self._mapper.views(str(path), placed, no_draws)
            end = min(start + plan.frames * plan.stride, count)
            yield start / rate, end / rate, {"video": views, "whole": False}

    def record(self, result: dict[str, Any], model_input: dict[str, Any]) -> dict[str, Any]:
        """{"whole", "class", "class_id", "score", "top": [[class, score], ...]}."""
        best = result["scores"].float().cpu().sort(descending=True, stable=True)
        named = [
            [self.classes.names[k], round(score, 6)]
            for score, k in zip(best.values[:_NAMED].tolist(), best.indices[:_NAMED].tolist())
        ]
        first = int(best.indices[0])
        about = {"whole": model_input["whole"], "class": named[0][0], "class_id": self.classes.ids[first]}
        return {**about, "score": named[0][1], "top": named}

    def draw(self, picture: np.ndarray, record: dict[str, Any], min_score: float) -> np.ndarray:
        """The likeliest classes in the upper left corner: the first always, others from ``min_score`` on."""
        shown = record["top"][:1] + [one for one in record["top"][1:_DRAWN] if one[1] >= min_score]
        drawn = picture.copy()
        size = max(11, min(picture.shape[:2]) // 20)
        y = 4
        for name, score in shown:
            text = f"{name} {score:.2f}"
            drawn[y : y + size + 4, 2 : 8 + text_width(text, size)] = 0
            put_text(drawn, text, (5, y + size), size, (255, 255, 255))
            y += size + 6
        return drawn


def clip_plans(plan: SamplingPlan, count: int) -> Iterator[tuple[int, SamplingPlan]]:
    """(first step, plan of one clip) of clips that cover a video of ``count`` steps; none where one would hold it."""
    span = plan.frames * plan.stride
    if plan.kind != "dense" or count <= span:
        return
    places = count - plan.stride * (plan.frames - 1)  # possible starts
    for number in range(math.ceil(count / span)):
        start = min(number * span, places - 1)
        # The middle of the interval that SamplingPlan turns into this start.
        draws = ((start + 0.5) / places,)
        yield start, SamplingPlan(plan.kind, plan.frames, plan.stride, plan.fps, 1, draws)
