"""Run a model on a batch, and keep of its feature maps what CKA needs: their Gram matrices.

They are computed inside the forward pass, as each module is called, so that maps live no longer than ever.

What one example is: of a map with a row per image, the image (a map, or all queries, flattened); of RoI features, the
RoI; of features of a clip's frames or of an image's attention windows, all rows of that clip or image together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2_frozen.backbone import FrozenBackbone
from d2_frozen.study.cka.estimator import IMAGE, Gram, gram_of_rows
from d2_frozen.study.cka.names import INPUT, tensors_in, tensors_in_arguments
from detectron2.modeling.poolers import ROIPooler


@dataclass
class _Rois:
    """RoIs that a pooler has cropped last: rows of the features that follow belong to them."""

    boxes: list[Tensor]
    kind: Hashable
    rows: int
    chosen: Tensor  # of the rows
    image_of: Tensor  # of the chosen rows


@dataclass
class _Part:
    """Rows of one model call; a batch of clips takes several."""

    rows: Tensor
    image_of: Tensor
    kind: Hashable


@dataclass
class _Chunks:
    """Chosen rows of RoI features, as far as a module that takes some RoIs at a time has come."""

    parts: list[Tensor] = field(default_factory=list)
    rows: int = 0  # of all RoIs so far


class GramCollector:
    """Hooks on all modules of a model while the ``with`` block lasts.

    Args:
        model: in eval mode.
        wanted: which feature maps, by name.
        rois: at most so many RoIs per image, drawn by (seed, batch, image): a Gram matrix has the square of all.
        seed: of that draw.
    """

    def __init__(
        self, model: nn.Module, wanted: Callable[[str], bool], *, rois: int = 32, seed: int = 0
    ) -> None:
        self.model = model
        self.wanted = wanted
        self.rois = rois
        self.seed = seed
        # All feature maps so far, in the order in which they come: name -> shape, and what an example of it is.
        self.seen: dict[str, tuple[tuple[int, ...], str]] = {}
        self._handles: list[Any] = []
        self._plain: list[FrozenBackbone] = []

    def __enter__(self) -> GramCollector:
        for name, module in self.model.named_modules():
            if isinstance(module, FrozenBackbone) and module.precision == "fp32":
                # What it runs otherwise is made of its weights, and calls none of its modules.
                module.forward = module.inner.forward  # type: ignore[method-assign]
                self._plain.append(module)
            if not name:  # the model itself: its results are no feature maps
                continue
            self._handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._plain:
            del module.forward  # the class's own again

    @torch.no_grad()
    def grams(self, batch: Sequence[Mapping[str, Any]], number: int = 0) -> dict[str, Gram]:
        """Gram matrices of the wanted maps.

        Args:
            batch: inputs of the model. Clips ("video") go through it one by one: its backbone takes a clip as a
                batch of frames, and its head then works on this clip alone.
            number: of the batch, for the draw of RoIs.
        """
        of_clips = "video" in batch[0]
        calls = [[one] for one in batch] if of_clips else [list(batch)]
        self._number, self._whole, self._thing = number, len(calls) == 1, "clip" if of_clips else "image"
        self._grams: dict[str, Gram] = {}
        self._parts: dict[str, list[_Part]] = defaultdict(list)
        for first, inputs in enumerate(calls):
            self._first, self._images = first, len(inputs)
            self._calls: dict[str, int] = defaultdict(int)
            self._last_rois: _Rois | None = None
            self._unfinished: dict[str, dict[str, _Chunks]] = defaultdict(dict)
            self.model(inputs)
        for name, parts in self._parts.items():
            self._grams[name] = _joined(parts)
        return self._grams

    def _before(self, module_name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], by_name: dict[str, Any]) -> None:
            if not self._unfinished[module_name]:
                self._calls[module_name] += 1
            crops = isinstance(module, ROIPooler)
            name = f"{self._call_name(module_name)}{INPUT}"
            for full_name, tensor in tensors_in_arguments(arguments, by_name, name):
                self._keep(module_name, full_name, tensor, None if crops else self._last_rois)
            if crops:
                self._note_rois(module_name, by_name["box_lists"] if "box_lists" in by_name else arguments[1])

        return hook

    def _after(self, module_name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            for full_name, tensor in tensors_in(output, self._call_name(module_name)):
                self._keep(module_name, full_name, tensor, self._last_rois)

        return hook

    def _call_name(self, module_name: str) -> str:
        earlier = self._calls[module_name] - 1
        return f"{module_name}#{earlier}" if earlier else module_name

    def _note_rois(self, pooler: str, box_lists: Sequence[Any]) -> None:
        boxes = [one.tensor for one in box_lists]
        last = self._last_rois
        if last is not None and all(torch.equal(a, b) for a, b in zip(last.boxes, boxes)):
            return  # one more map is cropped at the same places, as by HTC's semantic branch
        chosen, image_of, start = [], [], 0
        for image, one in enumerate(boxes):
            draw = np.random.default_rng([self.seed, self._number, image])
            places = np.sort(draw.permutation(len(one))[: self.rois])
            chosen.append(torch.from_numpy(places + start))
            image_of.append(torch.full((len(places),), image))
            start += len(one)
        # Later stages of a cascade crop refined boxes of the same proposals, with the same pooler: same examples. Boxes
        # of detections, which another pooler crops for the masks, are others, and so are those of another model.
        kind = (id(self.model), pooler, tuple(len(one) for one in boxes))
        self._last_rois = _Rois(boxes, kind, start, torch.cat(chosen), torch.cat(image_of))
        self._unfinished.clear()

    def _keep(self, module_name: str, name: str, tensor: Tensor, rois: _Rois | None) -> None:
        if rois is not None:
            self._keep_of_rois(module_name, name, tensor, rois)
        elif (
            tensor.numel() and len(tensor) % self._images == 0
        ):  # else no examples: a table of positions, say
            rows = tensor.reshape(self._images, -1)
            self._take(name, tensor.shape, _Part(rows, torch.arange(self._images), IMAGE))

    def _keep_of_rois(self, module_name: str, name: str, tensor: Tensor, rois: _Rois) -> None:
        """Behind a pooler all is about RoIs, maybe some at a time (mask heads on a CPU); that is one call for us."""
        chunks = self._unfinished[module_name].setdefault(name, _Chunks())
        places = rois.chosen - chunks.rows
        chunks.rows += len(tensor)
        if self.wanted(name):
            places = places[(places >= 0) & (places < len(tensor))]
            chunks.parts.append(tensor[places.to(tensor.device)].flatten(1))
        if chunks.rows < rois.rows:
            return
        del self._unfinished[module_name][name]
        if chunks.rows == rois.rows:
            rows = torch.cat(chunks.parts) if chunks.parts else tensor
            self._take(name, (rois.rows, *tensor.shape[1:]), _Part(rows, rois.image_of, rois.kind))

    def _take(self, name: str, shape: Sequence[int], part: _Part) -> None:
        self.seen.setdefault(name, (tuple(shape), self._thing if part.kind == IMAGE else "RoI"))
        if not self.wanted(name):
            return
        if self._whole:
            self._grams[name] = Gram(gram_of_rows(part.rows), part.image_of, part.kind)
        else:  # a copy, since what follows may change it in place
            self._parts[name].append(_Part(part.rows.clone(), part.image_of + self._first, part.kind))


def _joined(parts: Sequence[_Part]) -> Gram:
    rows = torch.cat([part.rows for part in parts])
    return Gram(gram_of_rows(rows), torch.cat([part.image_of for part in parts]), parts[0].kind)
