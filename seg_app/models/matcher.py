"""Which query answers for which target? The assignment of least cost, per image (arXiv 2005.12872, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seg_app.models.points import sample_all_masks
from seg_app.models.query_masks import GivenMasks, QueryMasks, query_masks

# Indices of the queries, in order, and of their targets; int64 on CPU.
Match = tuple[Tensor, Tensor]


class HungarianMatcher:
    """Assignment by class probability, mask cross entropy and dice, at points drawn once per image.

    Args:
        cost_class, cost_mask, cost_dice: weights of the three; Mask2Former's are 2, 5, 5.
        num_points: P, at which masks are compared.
    Raises:
        ValueError: all weights are 0.
    """

    def __init__(self, cost_class: float, cost_mask: float, cost_dice: float, num_points: int) -> None:
        if not (cost_class or cost_mask or cost_dice):
            raise ValueError(
                "the matcher has nothing to go by: the weights of class, mask and dice are all 0."
            )
        self.cost_class, self.cost_mask, self.cost_dice = cost_class, cost_mask, cost_dice
        self.num_points = num_points

    @torch.no_grad()
    def __call__(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> list[Match]:
        """
        Args:
            outputs: ``pred_logits`` (B, Q, K + 1), ``pred_masks`` (B, Q, h, w), or their :class:`QueryMasks`.
            targets: per image ``labels`` (T,) and ``masks`` (T, H, W), which need not be of the size of the
                predicted ones, nor equal in size between images.
        Returns:
            Per image, min(Q, T) pairs.
        Raises:
            FloatingPointError: predictions that are not finite.
        """
        costs = self.costs(outputs, targets).cpu()  # the only wait for the device
        if not bool(torch.isfinite(costs).all()):
            raise FloatingPointError(
                "predicted masks or classes are no longer finite, so they cannot be matched to the labels. Training "
                "diverged: lower SOLVER.BASE_LR, or turn SOLVER.AMP off."
            )
        matches = []
        for cost, target in zip(costs.numpy(), targets):
            queries, objects = linear_sum_assignment(cost[:, : len(target["labels"])])
            matches.append((torch.as_tensor(queries).long(), torch.as_tensor(objects).long()))
        return matches

    def costs(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """(B, Q, largest T) float32; columns behind an image's last target mean nothing."""
        logits, masks = outputs["pred_logits"].float(), query_masks(outputs["pred_masks"])
        # Autocast would make the products in half precision: in float16, sums over thousands of points become infinite.
        with torch.autocast(logits.device.type, enabled=False):
            return self._costs(logits, masks, targets)

    def _costs(
        self, logits: Tensor, masks: QueryMasks | GivenMasks, targets: Sequence[Mapping[str, Tensor]]
    ) -> Tensor:
        B, P = len(logits), self.num_points
        device = logits.device
        points = torch.cat([torch.rand(1, P, 2, device=device) for _ in range(B)])
        labels = pad_sequence([t["labels"].to(device).long() for t in targets], batch_first=True)  # (B, T)
        truth = pad_sequence(
            [sample_all_masks(t["masks"].to(device), places) for t, places in zip(targets, points)],
            batch_first=True,
        )  # (B, T, P)
        guess = masks.at(points)  # (B, Q, P)
        # The mask terms are linear in the truth, so all pairs of a batch are two matrix products.
        # -log p of a pixel is softplus(x) - x t for logit x and truth t.
        pairs = torch.bmm(truth, guess.transpose(1, 2)).transpose(1, 2)  # in this order: few rows times many
        cross_entropy = (F.softplus(guess).sum(-1, keepdim=True) - pairs) / P
        chance = guess.sigmoid()
        overlap = torch.bmm(truth, chance.transpose(1, 2)).transpose(1, 2)
        areas = chance.sum(-1, keepdim=True) + truth.sum(-1)[:, None]
        dice = 1 - (2 * overlap + 1) / (areas + 1)
        index = labels[:, None].expand(-1, logits.shape[1], -1)
        classes = -logits.softmax(-1).gather(2, index)
        return self.cost_class * classes + self.cost_mask * cross_entropy + self.cost_dice * dice
