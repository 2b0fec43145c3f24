"""Meta-architecture: a backbone of single frames, frozen or not, and a head that classifies clips.

In: list of dicts as ClipMapper makes them: "video" (V, T, 3, H, W) uint8, V views of one video; in training "label".
Out: {"loss_cls": ...} in training, else per video {"scores": (K,)}: class probabilities, averaged over its views. A
record with "bad" in place of "video" (it cannot be read) gives {"scores": None}.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2_frozen.backbone import FrozenBackbone
from d2_frozen.summary import backbone_parts
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from video_app.models.heads import build_video_head
from video_app.models.maps import maps_seen

Batch = list[dict[str, Any]]


class FramesBackbone(nn.Module):
    """What a video model does before its heads: clips -> normalised frames -> maps of each frame.

    Args:
        backbone: (N, 3, H, W) -> maps by name.
        pixel_mean, pixel_std: per channel, in 0..255.
        features: names of the maps that heads want; the others are dropped at once.
        frames_per_pass: see MODEL.VIDEO_HEAD.FRAMES_PER_PASS.
        freeze: ``MODEL.BACKBONE.FREEZE``; with "all" there must be a :class:`FrozenBackbone` in the backbone.
    Raises:
        ValueError: the backbone does not freeze what ``freeze`` says; frames_per_pass is below 1.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        backbone: Backbone,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        features: Sequence[str],
        frames_per_pass: int = 128,
        freeze: str | int = "none",
    ) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)
        self.backbone = backbone
        self.features = list(features)
        self.frames_per_pass = frames_per_pass
        if frames_per_pass < 1:
            raise ValueError(f"MODEL.VIDEO_HEAD.FRAMES_PER_PASS is {frames_per_pass}; it must be at least 1.")
        if freeze == "all" and self.frozen_backbone is None:
            raise ValueError(
                "MODEL.BACKBONE.FREEZE is all, but no part of the backbone is frozen. MODEL.BACKBONE.NAME "
                "build_frozen_bottom_up freezes the network that MODEL.FROZEN.BOTTOM_UP names; FREEZE none trains it."
            )

    @classmethod
    def backbone_arguments(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of this class by config."""
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "features": list(maps_seen(backbone.output_shape(), cfg.MODEL.VIDEO_HEAD.IN_FEATURES)),
            "frames_per_pass": cfg.MODEL.VIDEO_HEAD.FRAMES_PER_PASS,
            "freeze": cfg.MODEL.BACKBONE.FREEZE,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    @property
    def frozen_backbone(self) -> FrozenBackbone | None:
        """The frozen part; None with full fine-tuning."""
        return next((m for m in self.backbone.modules() if isinstance(m, FrozenBackbone)), None)

    def maps(self, clips: Tensor) -> dict[str, Tensor]:
        """(B, T, 3, H, W) uint8 -> {name: (B, T, C, h, w)}; every frame alone, a part of them at a time."""
        B, T = clips.shape[:2]
        # A network that trains keeps what it computes for its backward pass; passes would save nothing.
        keeps = torch.is_grad_enabled() and any(p.requires_grad for p in self.backbone.parameters())
        per_pass = B * T if keeps else self.frames_per_pass
        # Whole clips, or parts of one: what is computed of a clip does not depend on its place in the batch.
        some = clips.split(max(1, per_pass // T))
        passes = [part for one in some for part in one.flatten(0, 1).split(per_pass)]
        parts = [self.backbone(self._normalised(part)) for part in passes]
        return {
            name: torch.cat([part[name] for part in parts]).unflatten(0, (B, T)) for name in self.features
        }

    def _normalised(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 -> float32 on the model's device, padded with zeros to what the backbone divides."""
        images = (frames.to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std
        divisor = max(1, self.backbone.size_divisibility)
        below, right = (-side % divisor for side in images.shape[-2:])
        return F.pad(images, (0, right, 0, below)) if below or right else images

    def maps_of_views(self, views: Tensor) -> Iterator[dict[str, Tensor]]:
        """Maps of a video's (V, T, 3, H, W) views, as many at a time as ``frames_per_pass`` holds, but one at least."""
        for some in views.split(max(1, self.frames_per_pass // views.shape[1])):
            yield self.maps(some)

    def training_batch(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Maps of all clips, and their labels (B,)."""
        clips = torch.cat([one["video"] for one in batch])
        labels = [int(one["label"]) for one in batch for _ in one["video"]]
        # Not torch.tensor(labels, device=...), which would wait for all that the GPU has to do.
        return self.maps(clips), torch.tensor(labels).to(self.device, non_blocking=True)


@META_ARCH_REGISTRY.register()
class FrozenVideoClassifier(FramesBackbone):
    """Action recognition with any head of ``MODEL.VIDEO_HEAD.NAME``.

    Args:
        head: maps of clips -> logits (B, K).
        label_smoothing: share of the target that is spread over all classes.
        arguments: of :class:`FramesBackbone`.
    """

    @configurable
    def __init__(self, *, head: nn.Module, label_smoothing: float = 0.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.head = head
        self.label_smoothing = checked_smoothing(label_smoothing)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arguments = cls.backbone_arguments(cfg)
        return {
            **arguments,
            "head": build_video_head(cfg, arguments["backbone"].output_shape()),
            "label_smoothing": cfg.MODEL.VIDEO_HEAD.LABEL_SMOOTHING,
        }

    def parts(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of every part, for the table at the start of a run. Together they are the whole model."""
        yield from backbone_parts("backbone", self.backbone)
        yield "head", self.head

    def forward(self, batched_inputs: Batch) -> dict[str, Tensor] | list[dict[str, Any]]:
        """The loss in training mode, else the scores of every video."""
        if self.training:
            maps, labels = self.training_batch(batched_inputs)
            logits = self.head(maps)
            return {"loss_cls": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}
        return [{"scores": self._scores(one)} for one in batched_inputs]

    def _scores(self, record: Mapping[str, Any]) -> Tensor | None:
        if "bad" in record:
            return None
        return mean_over_views(self.head(maps) for maps in self.maps_of_views(record["video"]))


def mean_over_views(logits: Iterable[Tensor]) -> Tensor:
    """Logits of some views at a time, (v, K) each -> (K,) float32: the mean of their probabilities."""
    return torch.cat([some.float().softmax(dim=-1) for some in logits]).mean(dim=0)


def checked_smoothing(value: float) -> float:
    """
    Raises:
        ValueError: it is no share.
    """
    if not 0 <= value < 1:
        raise ValueError(f"MODEL.VIDEO_HEAD.LABEL_SMOOTHING is {value}; it must be in [0, 1).")
    return value
