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
from seg_app.models.points import draw_candidates, least_sure, sample_maps, sample_masks
from seg_app.models.query_masks import masks_of_layers, numbers_per_point

Targets = Sequence[Mapping[str, Tensor]]

# Layers are computed together, as many as need no more numbers than this in any one tensor (256 MiB in float32): of
# two images all ten, of sixteen one or two.
_NUMBERS_AT_ONCE = 2**26


class SetCriterion(nn.Module):
    """``loss_ce``, ``loss_mask`` and ``loss_dice``; for earlier layers the same names with ``_0``, ``_1`` ...

    Args:
        num_classes: K; class K is "no object".
        matcher: pairs queries with targets.
        weight_dict: factor by loss name, for :meth:`weighted`.
        no_object_weight: of "no object" in the cross entropy of classes.
        losses: of "labels" and "masks".
        num_points, oversample_ratio, importance_ratio: as in :func:`draw_candidates`.
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
        layers = [outputs, *outputs.get("aux_outputs", ())]
        endings = ["", *(f"_{i}" for i in range(len(layers) - 1))]
        losses = {}
        at_once = self._layers_at_once(outputs, targets)
        for first in range(0, len(layers), at_once):
            several = self._of_layers(layers[first : first + at_once], targets, count)
            for name, values in several.items():
                for ending, value in zip(endings[first:], values.unbind()):
                    losses[name + ending] = value
        return losses

    def weighted(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each loss times its weight; those without a weight are left out."""
        return {
            name: loss * self.weight_dict[name] for name, loss in losses.items() if name in self.weight_dict
        }

    def _layers_at_once(self, outputs: Mapping[str, Any], targets: Targets) -> int:
        queries = outputs["pred_logits"].shape[1]
        points = self.matcher.num_points * numbers_per_point(outputs["pred_masks"])
        matched = sum(self._matched(queries, targets))
        candidates = matched * 2 * int(self.num_points * self.oversample_ratio)
        return max(1, _NUMBERS_AT_ONCE // max(points, candidates, 1))

    @staticmethod
    def _matched(queries: int, targets: Targets) -> list[int]:
        """How many masks of each image are matched, whichever they are."""
        return [min(queries, len(target["labels"])) for target in targets]

    def _of_layers(
        self, layers: Sequence[Mapping[str, Any]], targets: Targets, count: Tensor
    ) -> dict[str, Tensor]:
        """Losses of L layers: by name, (L,)."""
        logits = torch.stack([one["pred_logits"] for one in layers])  # (L, B, Q, K + 1)
        masks = sum(self._matched(logits.shape[2], targets)) if "masks" in self.losses else 0
        drawn = [self._draw(len(targets), masks, logits.device) for _ in layers]
        places, candidates, anywhere = (torch.stack(parts) for parts in zip(*drawn))
        matches = self.matcher.of_layers(layers, targets, places)
        losses = {}
        if "labels" in self.losses:
            losses["loss_ce"] = self._class_loss(logits, targets, matches)
        if "masks" in self.losses:
            losses.update(self._mask_losses(layers, targets, matches, (candidates, anywhere), count))
        return losses

    def _draw(self, images: int, masks: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Of one layer: points of the matcher, candidates and other points of the mask losses."""
        places = self.matcher.draw(images, device)
        points = draw_candidates(masks, self.num_points, self.oversample_ratio, self.importance_ratio, device)
        return (places, *points)

    def _class_loss(self, logits: Tensor, targets: Targets, matches: Sequence[Sequence[Match]]) -> Tensor:
        wanted = torch.full(logits.shape[:3], self.num_classes, dtype=torch.long)
        for rows, of_layer in zip(wanted, matches):
            for row, target, (queries, objects) in zip(rows, targets, of_layer):
                row[queries] = target["labels_on_cpu"][objects]
        wanted = wanted.to(logits.device, non_blocking=True)
        each = F.cross_entropy(logits.float().movedim(3, 1), wanted, self.empty_weight, reduction="none")
        return each.flatten(1).sum(1) / self.empty_weight[wanted].flatten(1).sum(1)

    def _mask_losses(
        self,
        layers: Sequence[Mapping[str, Any]],
        targets: Targets,
        matches: Sequence[Sequence[Match]],
        drawn: tuple[Tensor, Tensor],
        count: Tensor,
    ) -> dict[str, Tensor]:
        L, B = len(matches), len(targets)
        sizes = [len(queries) for queries, _ in matches[0]]
        device = drawn[0].device
        # One copy to the device for all: (2, L, N), queries and objects.
        numbers = torch.stack(
            [torch.stack([torch.cat([one[k] for one in of_layer]) for of_layer in matches]) for k in (0, 1)]
        ).to(device, non_blocking=True)
        queries, objects = (part.split(sizes, dim=1) for part in numbers)
        matched = masks_of_layers([one["pred_masks"] for one in layers]).chosen(queries)  # (L, N, h, w)
        matched = matched.flatten(0, 1)[:, None]
        points = least_sure(matched.detach(), *(part.flatten(0, 1) for part in drawn), self.num_points)
        by_image = points.view(L, -1, self.num_points, 2).split(sizes, dim=1)
        truth = torch.cat(
            [
                sample_masks(
                    targets[b]["masks"].to(device), objects[b].flatten(), by_image[b].flatten(0, 1)
                ).view(L, -1, self.num_points)
                for b in range(B)
            ],
            dim=1,
        )  # (L, N, P)
        guess = sample_maps(matched, points).view(truth.shape)
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
        logits, truth: (.., N, P).
        count: number of masks to divide by.
    Returns:
        (..).
    """
    each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return each.mean(-1).sum(-1) / count


def dice_loss(logits: Tensor, truth: Tensor, count: Tensor | float) -> Tensor:
    """1 - (2 |A B| + 1) / (|A| + |B| + 1) with soft sets (arXiv 1606.04797), sum over masks, divided by ``count``.

    Shapes as of :func:`mask_cross_entropy`.
    """
    chance = logits.sigmoid()
    overlap = (chance * truth).sum(-1)
    dice = 1 - (2 * overlap + 1) / (chance.sum(-1) + truth.sum(-1) + 1)
    return dice.sum(-1) / count
