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
from seg_app.models.query_masks import masks_of_layers

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

    def draw(self, images: int, device: torch.device) -> Tensor:
        """Points (images, P, 2) at which the masks of one layer are compared."""
        return torch.cat([torch.rand(1, self.num_points, 2, device=device) for _ in range(images)])

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
        points = self.draw(len(targets), outputs["pred_logits"].device)
        return self.of_layers([outputs], targets, points[None])[0]

    @torch.no_grad()
    def of_layers(
        self, layers: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Tensor]], points: Tensor
    ) -> list[list[Match]]:
        """As a call with the outputs of each layer, with one wait for the device.

        Args:
            points: (L, B, P, 2).
        Returns:
            By layer and image.
        """
        costs = self._costs(layers, targets, points).cpu()
        if not bool(torch.isfinite(costs).all()):
            raise FloatingPointError(
                "predicted masks or classes are no longer finite, so they cannot be matched to the labels. Training "
                "diverged: lower SOLVER.BASE_LR, or turn SOLVER.AMP off."
            )
        return [
            [_assignment(cost[:, : len(t["labels"])]) for cost, t in zip(of_layer, targets)]
            for of_layer in costs
        ]

    @torch.no_grad()
    def costs(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """(B, Q, largest T) float32; columns behind an image's last target mean nothing."""
        points = self.draw(len(targets), outputs["pred_logits"].device)
        return self._costs([outputs], targets, points[None])[0]

    def _costs(
        self, layers: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Tensor]], points: Tensor
    ) -> Tensor:
        """(L, B, Q, largest T) float32."""
        logits = torch.stack([one["pred_logits"] for one in layers]).float()  # (L, B, Q, K + 1)
        masks = masks_of_layers([one["pred_masks"] for one in layers])
        # Autocast would make the products in half precision: in float16, sums over thousands of points become infinite.
        with torch.autocast(logits.device.type, enabled=False):
            return self._costs_of(logits, masks.at(points), targets, points)

    def _costs_of(
        self, logits: Tensor, guess: Tensor, targets: Sequence[Mapping[str, Tensor]], points: Tensor
    ) -> Tensor:
        L, B, P, _ = points.shape
        device = logits.device
        labels = pad_sequence([t["labels"].to(device).long() for t in targets], batch_first=True)  # (B, T)
        truth = pad_sequence(
            [
                sample_all_masks(t["masks"].to(device), places.flatten(0, 1))  # (T, L * P)
                for t, places in zip(targets, points.unbind(1))
            ],
            batch_first=True,
        )
        truth = truth.view(B, -1, L, P).permute(2, 0, 1, 3)  # (L, B, T, P)
        # The mask terms are linear in the truth, so all pairs of a batch are two matrix products.
        # -log p of a pixel is softplus(x) - x t for logit x and truth t.
        pairs = torch.matmul(truth, guess.mT).mT  # in this order: few rows times many
        cross_entropy = (F.softplus(guess).sum(-1, keepdim=True) - pairs) / P
        chance = guess.sigmoid()
        overlap = torch.matmul(truth, chance.mT).mT
        areas = chance.sum(-1, keepdim=True) + truth.sum(-1)[:, :, None]
        dice = 1 - (2 * overlap + 1) / (areas + 1)
        index = labels[None, :, None].expand(L, -1, logits.shape[2], -1)
        classes = -logits.softmax(-1).gather(3, index)
        return self.cost_class * classes + self.cost_mask * cross_entropy + self.cost_dice * dice


def _assignment(cost: Tensor) -> Match:
    queries, objects = linear_sum_assignment(cost.numpy())
    return torch.as_tensor(queries).long(), torch.as_tensor(objects).long()
