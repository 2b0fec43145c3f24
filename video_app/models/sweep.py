"""Meta-architecture of a probe sweep: many heads on one frozen forward, each as it would be alone.

In, and out in testing: as FrozenVideoClassifier, of the best head so far; "heads" has the scores of every head, None
for one that diverged. In training: one loss per head.
Source: V-JEPA 2, arXiv:2506.09985, trains 20 probes at once, of several rates and decays, and reports the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2_frozen.summary import backbone_parts
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from video_app.models.classifier import (
    Batch,
    FramesBackbone,
    FrozenVideoClassifier,
    checked_smoothing,
    mean_over_views,
)
from video_app.models.heads import build_video_head

SWEEP = "FrozenVideoSweep"


class Candidate(NamedTuple):
    """What one head of a sweep has of its own."""

    name: str
    lr: float
    weight_decay: float

    def config(self, cfg: CfgNode) -> CfgNode:
        """Of a run that trains this head alone."""
        alone = cfg.clone()
        alone.defrost()
        alone.MODEL.META_ARCHITECTURE = "FrozenVideoClassifier"
        alone.MODEL.VIDEO_HEAD.NAME = self.name
        alone.SOLVER.BASE_LR, alone.SOLVER.WEIGHT_DECAY = self.lr, self.weight_decay
        sweep = alone.MODEL.VIDEO_HEAD.SWEEP
        sweep.NAMES, sweep.LR, sweep.WEIGHT_DECAY = [], [], []
        alone.freeze()
        return alone


def candidates(cfg: CfgNode) -> list[Candidate]:
    """Every combination of MODEL.VIDEO_HEAD.SWEEP, in the order of its lists.

    Raises:
        ValueError: a rate or decay that is no number of the right range, or the same combination twice.
    """
    sweep, solver = cfg.MODEL.VIDEO_HEAD.SWEEP, cfg.SOLVER
    names = [str(name) for name in sweep.NAMES or [cfg.MODEL.VIDEO_HEAD.NAME]]
    try:
        # Yaml reads 1e-3 as a text; 1.0e-3 is a number to it.
        rates = [float(rate) for rate in sweep.LR or [solver.BASE_LR]]
        decays = [float(decay) for decay in sweep.WEIGHT_DECAY or [solver.WEIGHT_DECAY]]
    except (TypeError, ValueError):
        rates = decays = []
    if not rates or not all(rate > 0 for rate in rates) or not all(decay >= 0 for decay in decays):
        raise ValueError(
            f"MODEL.VIDEO_HEAD.SWEEP: LR {sweep.LR} must be numbers above 0, WEIGHT_DECAY {sweep.WEIGHT_DECAY} of 0 "
            "or more."
        )
    found = [Candidate(*one) for one in product(names, rates, decays)]
    if len(set(found)) < len(found):
        raise ValueError("MODEL.VIDEO_HEAD.SWEEP names a combination twice.")
    return found


@META_ARCH_REGISTRY.register()
class FrozenVideoSweep(FramesBackbone):
    """Heads that share nothing but the frozen maps.

    A head starts with the draws that it would have alone, and draws in each iteration what it would alone. A head whose
    loss is no number any more is set aside; the others go on. When none is left, training ends (FloatingPointError).
    What a head needs for its backward pass is computed again in it (checkpointing), so that memory holds one head at a
    time.

    Args:
        heads: maps of clips -> logits (B, K), each.
        candidates: what they are, in the same order.
        arguments: of :class:`FramesBackbone`.
    Raises:
        ValueError: the backbone trains.
    """

    diverged: Tensor
    best: Tensor

    @configurable
    def __init__(
        self,
        *,
        heads: Sequence[nn.Module],
        candidates: Sequence[Candidate],
        label_smoothing: float = 0.0,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        if any(parameter.requires_grad for parameter in self.backbone.parameters()):
            raise ValueError(
                f"{SWEEP} trains heads side by side on one frozen backbone. Set MODEL.BACKBONE.FREEZE: all, and "
                "MODEL.BACKBONE.NAME: build_frozen_bottom_up."
            )
        self.heads = nn.ModuleList(heads)
        self.candidates = list(candidates)
        self.label_smoothing = checked_smoothing(label_smoothing)
        self.register_buffer("diverged", torch.zeros(len(self.heads), dtype=torch.bool))
        # Its index, as of the last evaluation.
        self.register_buffer("best", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arguments = cls.backbone_arguments(cfg)
        shapes = arguments["backbone"].output_shape()
        found = candidates(cfg)
        before = torch.get_rng_state()
        heads = []
        for candidate in found:
            torch.set_rng_state(before)
            heads.append(build_video_head(candidate.config(cfg), shapes))
        return {
            **arguments,
            "heads": heads,
            "candidates": found,
            "label_smoothing": cfg.MODEL.VIDEO_HEAD.LABEL_SMOOTHING,
        }

    def alone(self, index: int) -> FrozenVideoClassifier:
        """A model of one of the heads, sharing its tensors and the backbone's."""
        model = FrozenVideoClassifier(
            head=self.heads[index],
            label_smoothing=self.label_smoothing,
            backbone=self.backbone,
            pixel_mean=self.pixel_mean.flatten().tolist(),
            pixel_std=self.pixel_std.flatten().tolist(),
            features=self.features,
            frames_per_pass=self.frames_per_pass,
        )
        return model.to(self.device).train(self.training)

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of every part, for the table at the start of a run. Together they are the whole model."""
        yield from backbone_parts("backbone", self.backbone)
        for index, head in enumerate(self.heads):
            yield f"heads.{index}", head

    def forward(self, batched_inputs: Batch) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Losses of all heads in training mode, else the scores of every video."""
        if self.training:
            return self._losses(batched_inputs)
        results = []
        for one in batched_inputs:
            scores = self._scores(one)
            results.append({"scores": scores[int(self.best)], "heads": scores})
        return results

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        # At once, and first: on a GPU a look at it waits for all that was begun.
        diverged = self.diverged.tolist()
        maps, labels = self.training_batch(batch)
        draws = _Draws(self.device)
        losses = []
        for head, gone in zip(self.heads, diverged):
            if gone:
                losses.append(_nothing(head))
                continue
            draws.again()
            logits = checkpoint(head, maps, use_reentrant=False)
            losses.append(F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing))
        lost = _in_any_process(~torch.isfinite(torch.stack([loss.detach() for loss in losses])))
        if lost.any():
            self.diverged |= lost
            if self.diverged.all():
                rates = sorted({one.lr for one in self.candidates})
                raise FloatingPointError(
                    f"all {len(self.heads)} heads of the sweep have diverged; their rates are {rates}. Lower "
                    "MODEL.VIDEO_HEAD.SWEEP.LR, or warm up longer (SOLVER.WARMUP_ITERS)."
                )
            losses = [
                _nothing(head) if gone else loss
                for head, loss, gone in zip(self.heads, losses, lost.tolist())
            ]
        return {f"loss_cls_{index:02d}": loss for index, loss in enumerate(losses)}

    def _scores(self, record: dict[str, Any]) -> list[Tensor | None]:
        """Of every head."""
        running = [index for index, gone in enumerate(self.diverged.tolist()) if not gone]
        scores: list[Tensor | None] = [None] * len(self.heads)
        if "bad" in record:
            return scores
        logits: dict[int, list[Tensor]] = {index: [] for index in running}
        for maps in self.maps_of_views(record["video"]):
            for index in running:
                logits[index].append(self.heads[index](maps))
        for index in running:
            scores[index] = mean_over_views(logits[index])
        return scores


class _Draws:
    """The state of torch's generators as it is now, to return to."""

    def __init__(self, device: torch.device) -> None:
        self._cpu = torch.get_rng_state()
        self._device = device
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def again(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


def _in_any_process(flags: Tensor) -> Tensor:
    """Gradients are the mean over processes, so a head that one of them has lost is lost for all."""
    if comm.get_world_size() == 1:
        return flags
    counts = flags.to(torch.int32)
    torch.distributed.all_reduce(counts)
    return counts > 0


def _nothing(head: nn.Module) -> Tensor:
    """0, whose gradient is 0 for every parameter, also for one that is no number: DDP wants a gradient of each."""
    zeros = [(p.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) * 0.0).sum() for p in head.parameters()]
    return torch.stack(zeros).sum()
