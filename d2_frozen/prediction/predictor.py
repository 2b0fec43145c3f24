"""Pictures -> results of every head, one pass of each frozen backbone per picture and input size.

predictor = Predictor(["output/parts/model_final.pth", "output/street/model_final.pth"])
results = predictor([picture])[0]            # (H, W, 3) uint8 RGB -> {"parts": {"instances"}, "street": {"sem_seg"}}
drawn = predictor.draw(picture, results)
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from d2_frozen.backbone import PassMemory, frozen_parts
from d2_frozen.prediction.heads import Head, load_heads, share_backbones
from d2_frozen.tasks import Prediction
from detectron2.data import transforms as T

Results = dict[str, dict[str, Any]]


class Predictor:
    """Any number of heads on as few backbones as they need.

    Every head gets pictures at the size of its own test settings, so that its results are those of ``--eval-only``;
    heads with equal backbones and equal sizes share the pass. ``size`` makes it one size for all.

    It may be called from several threads: they take turns. It can be pickled and copied (``copy.deepcopy``).

    Args:
        heads, config_files, device, options: see :func:`load_heads`.
        size: long side in pixels to which pictures are resized, for every head; they are not padded to a square then,
            as INPUT.SCALE_CROP.TEST_RESIZE "square" would have it.
    Attributes:
        heads: in the order given.
        memory: counts ``passes`` of backbones, and ``reused`` ones.
    """

    def __init__(
        self,
        heads: Sequence[str | Path],
        config_files: Sequence[str | Path] = (),
        *,
        device: str | None = None,
        size: int | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._take(load_heads(heads, config_files, device, options), size)

    @classmethod
    def of(cls, heads: Sequence[Head], size: int | None = None) -> Predictor:
        """Of heads that are built already (:func:`build_head`); those of equal backbones share one from now on."""
        predictor = cls.__new__(cls)
        share_backbones(heads)
        predictor._take(list(heads), size)
        return predictor

    def _take(self, heads: list[Head], size: int | None) -> None:
        if size is not None and size < 1:
            raise ValueError(f"size is {size}; it is the long side in pixels.")
        self.heads = heads
        self.size = size
        for head in heads:
            if size is not None and hasattr(head.model, "square"):
                # Padding to a square of another size than the others' pictures would be a pass of its own.
                vars(head.model)["square"] = 0
        self.memory = PassMemory()
        self._turn = threading.Lock()
        self._models: dict[str, nn.Module] = {
            head.name: _of_pictures(head).testing_model(head.model) for head in self.picture_heads
        }
        self._compact_models: dict[str, nn.Module] = {
            head.name: _of_pictures(head).compact_model(head.model) for head in self.picture_heads
        }
        self._backbones = [part for head in self.heads for part in frozen_parts(head.model).values()]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_turn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _turn=threading.Lock())

    @property
    def picture_heads(self) -> list[Head]:
        """Those that take pictures, and frames of videos."""
        return [head for head in self.heads if not head.takes_clips]

    @property
    def clip_heads(self) -> list[Head]:
        """Those that take videos, clip by clip."""
        return [head for head in self.heads if head.takes_clips]

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[Results]:
        """Predict pictures of any sizes. Those of one size go through the networks together.

        Args:
            pictures: each (H, W, 3) uint8 in RGB order.
        Returns:
            Per picture, head name -> the model's result at the picture's size: ``{"instances"}``, ``{"sem_seg"}``.
        Raises:
            ValueError, TypeError: something that is no such picture, with its place in the list; nothing is predicted.
                No head takes pictures.
        """
        if not self.picture_heads:
            raise ValueError(
                f"{', '.join(head.name for head in self.heads)} takes no pictures but videos, clip by clip: "
                "head.prediction.clips(path) gives them, predictor.clip(head, clip) predicts one (docs/predict.md)."
            )
        return self._predict(pictures, compact=False)

    def compact(self, pictures: Sequence[np.ndarray]) -> list[Results]:
        """As a call, but only what files and drawings need, on the CPU: labels without scores, at any size."""
        return self._predict(pictures, compact=True)

    def _predict(self, pictures: Sequence[np.ndarray], compact: bool) -> list[Results]:
        _check(pictures)
        by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, picture in enumerate(pictures):
            by_size[picture.shape[:2]].append(index)
        results: list[Results] = [{} for _ in pictures]
        for indices in by_size.values():
            for index, result in zip(indices, self._of_one_size([pictures[i] for i in indices], compact)):
                results[index] = result
        return results

    def clip(self, head: Head, model_input: dict[str, Any]) -> dict[str, Any]:
        """The result of a clip head for one clip, as ``head.prediction.clips`` gives it."""
        with torch.no_grad():
            return head.model([model_input])[0]

    def draw(self, picture: np.ndarray, results: Results, min_score: float = 0.5) -> np.ndarray:
        """All results on one picture, (H, W, 3) uint8 RGB: labelled areas below, objects above."""
        areas_first = sorted(self.picture_heads, key=lambda head: "instances" in results.get(head.name, ()))
        for head in areas_first:
            if head.name in results:
                picture = _of_pictures(head).draw(picture, results[head.name], min_score)
        return picture

    def plan(self, height: int = 1080, width: int = 1920) -> list[list[Head]]:
        """Which heads share the pass for pictures of this size: groups, one pass each."""
        groups: dict[Hashable, list[Head]] = defaultdict(list)
        for head in self.picture_heads:
            shared = tuple(id(part) for part in frozen_parts(head.model).values()) or id(head.model)
            groups[shared, _network_input(head, *self.input_size(head, height, width))].append(head)
        return list(groups.values())

    def describe(self, height: int = 1080, width: int = 1920) -> str:
        """The plan in words, a line per pass."""
        lines = []
        for number, group in enumerate(self.plan(height, width), 1):
            h, w = self.input_size(group[0], height, width)
            names = " + ".join(head.name for head in group)
            part = next(iter(frozen_parts(group[0].model).values()), None)
            network = f"frozen {part.name}" if part is not None else "a network of its own"
            lines.append(f"pass {number}: {names} on {network}, a {width}x{height} picture at {w}x{h}")
        lines += [f"{head.name}: videos, clip by clip" for head in self.clip_heads]
        kinds = {
            frozenset(id(part) for part in frozen_parts(head.model).values()) for head in self.picture_heads
        }
        if self.size is None and len(lines) - len(self.clip_heads) > len(kinds):
            lines.append(
                "Heads on one backbone differ in their test sizes; --size LONG_SIDE makes it one pass."
            )
        return "\n".join(lines)

    def _of_one_size(self, pictures: list[np.ndarray], compact: bool) -> list[Results]:
        height, width = pictures[0].shape[:2]
        resized: dict[tuple[int, int], list[np.ndarray]] = {}
        results: list[Results] = [{} for _ in pictures]
        # What is remembered is of these pictures: one call at a time.
        with self._turn:
            try:
                with torch.no_grad(), self.memory.on(self._backbones):
                    for head in self.picture_heads:
                        size = self.input_size(head, height, width)
                        if size not in resized:
                            resized[size] = [_resize(picture, size) for picture in pictures]
                        prediction = _of_pictures(head)
                        wanted = (height, width) if compact else prediction.output_size(height, width)
                        batch = model_inputs(head, resized[size], *wanted)
                        model = (self._compact_models if compact else self._models)[head.name]
                        for result, found in zip(results, model(batch)):
                            result[head.name] = prediction.compact(found) if compact else found
            finally:
                self.memory.forget()
        return results

    def input_size(self, head: Head, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels at which a head sees a picture of this size."""
        if self.size is None:
            return _of_pictures(head).input_size(height, width)
        scale = self.size / max(height, width)
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def model_inputs(head: Head, resized: Sequence[np.ndarray], height: int, width: int) -> list[dict[str, Any]]:
    """What the model takes, of pictures at its size; ``height`` x ``width`` pixels is that of the results."""
    return [
        {"image": _as_tensor(one, head.cfg.INPUT.FORMAT), "height": height, "width": width} for one in resized
    ]


def _check(pictures: Any) -> None:
    """
    Raises:
        ValueError, TypeError: see :meth:`Predictor.__call__`.
    """
    wanted = "a picture is a numpy array, (H, W, 3) uint8 in RGB order"
    if isinstance(pictures, str | Path) or getattr(pictures, "ndim", 4) < 4:
        raise TypeError(f"a predictor takes a list of pictures, predictor([picture]); {wanted}.")
    for index, picture in enumerate(pictures):
        if not isinstance(picture, np.ndarray):
            raise TypeError(
                f"{wanted}, but number {index} is a {type(picture).__name__}. "
                'detectron2.data.detection_utils.read_image(path, "RGB") reads a file into one; '
                'np.asarray(image.convert("RGB")) makes one of a PIL image, '
                "tensor.permute(1, 2, 0).cpu().numpy() of a (3, H, W) uint8 tensor."
            )
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or 0 in picture.shape:
            raise ValueError(f"{wanted}, but number {index} is {picture.dtype} of shape {picture.shape}.")


def _of_pictures(head: Head) -> Prediction:
    assert not head.takes_clips
    return cast(Prediction, head.prediction)


def _resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """As Detectron2 resizes test images."""
    if picture.shape[:2] == size:
        return picture
    return T.ResizeTransform(*picture.shape[:2], *size, Image.Resampling.BILINEAR).apply_image(picture)


def _as_tensor(picture: np.ndarray, image_format: str) -> torch.Tensor:
    """(h, w, 3) RGB -> (3, h, w) in the model's order of channels."""
    ordered = picture if image_format == "RGB" else picture[:, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(ordered.transpose(2, 0, 1)))


def _network_input(head: Head, height: int, width: int) -> Hashable:
    """Equal where two heads bring the same tensor to their backbone."""
    cfg, model = head.cfg, cast(Any, head.model)
    divisor = max(1, getattr(model, "size_divisibility", None) or model.backbone.size_divisibility)
    square: int = getattr(model, "square", 0)
    padded = [math.ceil(max(side, square) / divisor) * divisor for side in (height, width)]
    return (height, width), *padded, cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD)
