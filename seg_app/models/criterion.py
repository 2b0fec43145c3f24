"""Loss of predicted classes and masks against the targets they are matched to, after every decoder layer.

Method: arXiv 2112.01527, sections 3.2.2 (deep supervision) and 3.3 (losses on sampled points).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.utils import comm
from seg_app.models.matcher import HungarianMatcher, Match
from seg_app.models.points import draw_uncertain_points, sample_maps, sample_masks
from seg_app.models.query_masks import QueryMasks, query_masks

Targets = Sequence[Mapping[str, Tensor]]


class SetCriterion(nn.Module):
    """``loss_ce``, ``loss_mask`` and ``loss_dice``; for earlier layers the same names with ``_0``, ``_1`` ...

    Args:
        num_classes: K; class K is "no object".
        matcher: pairs queries with targets.
        weight_dict: factor by loss name, for :meth:`weighted`.
        no_object_weight: of "no object" in the cross entropy of classes.
        losses: of "labels" and "masks".
        num_points, oversample_ratio, importance_ratio: as in :func:`draw_uncertain_points`.
    Raises:
        ValueError: ratios that give no points.
    """

    empty_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weight_dict: Mapping[str, float],
        *,
        no_object_weight: float,
        num_points: int,
        oversample_ratio: float,
        importance_ratio: float,
        losses: Sequence[str] = ("labels", "masks"),
    ) -> None:
        super().__init__()
        if oversample_ratio < 1 or not 0 <= importance_ratio <= 1 or num_points < 1:
            raise ValueError(
                f"MODEL.MASK_FORMER: TRAIN_NUM_POINTS is {num_points} (at least 1), OVERSAMPLE_RATIO "
                f"{oversample_ratio} (at least 1), IMPORTANCE_SAMPLE_RATIO {importance_ratio} (0 to 1)."
            )
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = dict(weight_dict)
        self.losses = tuple(losses)
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_ratio = importance_ratio
        weight = torch.ones(num_classes + 1)
        weight[-1] = no_object_weight
        self.register_buffer("empty_weight", weight)

    def forward(self, outputs: Mapping[str, Any], targets: Targets) -> dict[str, Tensor]:
        """
        Args:
            outputs: of :class:`MaskedTransformerDecoder`.
            targets: as for :class:`HungarianMatcher`.
        Returns:
            The losses, without their weights.
        """
        count = self._targets_per_worker(targets, outputs["pred_logits"].device)
        # Once, not in every layer: matches are on the CPU, and each copy to it waits for the device.
        labels = torch.cat([target["labels"] for target in targets]).cpu().long()
        of_image = labels.split([len(target["labels"]) for target in targets])
        targets = [{**target, "labels_on_cpu": own} for target, own in zip(targets, of_image)]
        losses = self._of_layer(outputs, targets, count)
        for i, earlier in enumerate(outputs.get("aux_outputs", ())):
            of_layer = self._of_layer(earlier, targets, count)
            losses.update({f"{name}_{i}": loss for name, loss in of_layer.items()})
        return losses

    def weighted(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each loss times its weight; those without a weight are left out."""
        return {
            name: loss * self.weight_dict[name] for name, loss in losses.items() if name in self.weight_dict
        }

    def _of_layer(self, outputs: Mapping[str, Any], targets: Targets, count: Tensor) -> dict[str, Tensor]:
        matches = self.matcher(outputs, targets)
        losses = {}
        if "labels" in self.losses:
            losses["loss_ce"] = self._class_loss(outputs["pred_logits"], targets, matches)
        if "masks" in self.losses:
            losses.update(self._mask_losses(outputs["pred_masks"], targets, matches, count))
        return losses

    def _class_loss(self, logits: Tensor, targets: Targets, matches: Sequence[Match]) -> Tensor:
        wanted = torch.full(logits.shape[:2], self.num_classes, dtype=torch.long)
        for row, target, (queries, objects) in zip(wanted, targets, matches):
            row[queries] = target["labels_on_cpu"][objects]
        wanted = wanted.to(logits.device, non_blocking=True)
        return F.cross_entropy(logits.float().transpose(1, 2), wanted, self.empty_weight)

    def _mask_losses(
        self, masks: Tensor | QueryMasks, targets: Targets, matches: Sequence[Match], count: Tensor
    ) -> dict[str, Tensor]:
        matched = query_masks(masks).chosen([queries for queries, _ in matches])  # (N, 1, h, w)
        points = draw_uncertain_points(
            matched.detach(), self.num_points, self.oversample_ratio, self.importance_ratio
        )
        per_image = points.split([len(queries) for queries, _ in matches])
        truth = torch.cat(
            [
                sample_masks(
                    t["masks"].to(places.device), objects.to(places.device, non_blocking=True), places
                )
                for t, (_, objects), places in zip(targets, matches, per_image)
            ]
        )  # (N, P)
        guess = sample_maps(matched, points).squeeze(1)
        return {
            "loss_mask": mask_cross_entropy(guess, truth, count),
            "loss_dice": dice_loss(guess, truth, count),
        }

    def _targets_per_worker(self, targets: Targets, device: torch.device) -> Tensor:
        """Mean number of targets per worker, at least 1: every worker divides by the same."""
        count = torch.full((), float(sum(len(t["labels"]) for t in targets)), device=device)
        workers = comm.get_world_size()
        if workers > 1:
            torch.distributed.all_reduce(count)
        return (count / workers).clamp(min=1)


def mask_cross_entropy(logits: Tensor, truth: Tensor, count: Tensor | float) -> Tensor:
    """Binary cross entropy, mean over the points of a mask, sum over the masks, divided by ``count``.

    Args:
        logits, truth: (N, P).
        count: number of masks to divide by.
    """
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1).sum() / count


def dice_loss(logits: Tensor, truth: Tensor, count: Tensor | float) -> Tensor:
    """1 - (2 |A B| + 1) / (|A| + |B| + 1) with soft sets (arXiv 1606.04797), sum over masks, divided by ``count``."""
    chance = logits.sigmoid()
    overlap = (chance * truth).sum(1)
    dice = 1 - (2 * overlap + 1) / (chance.sum(1) + truth.sum(1) + 1)
    return dice.sum() / count
