"""A contact sheet: frames of test clips, what they are labelled, and what the model says with its scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from d2_frozen.data import build_test_loader
from d2_frozen.detection.pictures import predicted_pairs, predictions_path, spread, write_sheet
from d2_frozen.lettering import put_text
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from video_app.clips.mapper import ClipMapper
from video_app.evaluation.evaluator import class_names

_FRAMES = 6
_FRAME_PX = 96
_NAMED = 3
_GREY, _GREEN, _RED = (60, 60, 60), (20, 120, 40), (180, 30, 30)


def write_contact_sheet(cfg: CfgNode, model: nn.Module, dataset_name: str, count: int) -> Path | None:
    """Test ``count`` videos spread over a dataset, with the views of the evaluation, and write them as one picture.

    Args:
        model: in any mode; it is left in the mode it came in.
        count: number of videos; 0 writes nothing.
    Returns:
        Path of ``OUTPUT_DIR/inference/predictions_NAME.jpg``, or None.
    """
    classes = class_names(dataset_name, cfg.MODEL.VIDEO_HEAD.NUM_CLASSES)
    mapper = ClipMapper.from_config(cfg, is_train=False)

    def strip(item: dict[str, Any], result: dict[str, Any]) -> np.ndarray:
        said = prediction_line(classes, item["label"], result["scores"], item.get("bad", ""))
        return clip_strip(classes[item["label"]], middle_view(mapper, item), *said)

    try:
        strips = predicted_pairs(
            model,
            len(DatasetCatalog.get(dataset_name)),
            count,
            lambda indices: build_test_loader(cfg, dataset_name, mapper=mapper, indices=indices),
            strip,
        )
    finally:
        mapper.decoder.close()
    return write_sheet(predictions_path(cfg, dataset_name), strips)


def middle_view(mapper: ClipMapper, item: dict[str, Any]) -> torch.Tensor | None:
    """Of a video's test views the middle crop of the middle clip, (T, 3, S, S) RGB; None where it cannot be read."""
    if "video" not in item:
        return None
    crops = mapper.num_crops  # those of a clip lie side by side
    view = item["video"][mapper.plan.clips // 2 * crops + crops // 2]
    return view.flip(1) if mapper.bgr else view


def prediction_line(
    classes: Sequence[str], label: int, scores: torch.Tensor | None, bad: str = ""
) -> tuple[str, tuple[int, int, int]]:
    """What a model says of a clip, and a colour: green where the most likely class is the label, red where not.

    Args:
        scores: (K,) probabilities; None for a bad video.
        bad: why there are none.
    """
    if scores is None:
        return f"cannot be read: {bad or 'no scores'}", _RED
    best = scores.float().cpu().sort(descending=True, stable=True)
    named = [f"{_short(classes[k])} {p:.2f}" for p, k in zip(*(x[:_NAMED].tolist() for x in best))]
    return f"predicted: {', '.join(named)}", _GREEN if int(best.indices[0]) == label else _RED


def clip_strip(
    label: str, frames: torch.Tensor | None, text: str = "", colour: tuple[int, int, int] = _GREY
) -> np.ndarray:
    """One clip: up to six frames side by side, above them its label and a line of text.

    Args:
        label: name of the class.
        frames: (T, 3, S, S) uint8 RGB; None for a bad video.
    Returns:
        (h, w, 3) uint8 RGB.
    """
    width = _FRAMES * _FRAME_PX
    row = np.full((_FRAME_PX, width, 3), 225, np.uint8)
    if frames is not None:
        for place, index in enumerate(spread(len(frames), _FRAMES)):
            picture = np.ascontiguousarray(frames[index].permute(1, 2, 0).cpu().numpy())
            small = cv2.resize(picture, (_FRAME_PX, _FRAME_PX), interpolation=cv2.INTER_AREA)
            row[:, place * _FRAME_PX : (place + 1) * _FRAME_PX] = small
    band = np.full((40, width, 3), 255, np.uint8)
    put_text(band, f"labelled: {_short(label)}", (4, 15), 12, _GREY)
    put_text(band, text, (4, 33), 12, colour)
    return np.vstack([band, row])


def _short(name: str) -> str:
    return name if len(name) <= 26 else f"{name[:24]}.."
