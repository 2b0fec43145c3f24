"""Masks of the queries, before anybody asked for all their pixels.

A mask is the product of a query's embedding with the map of features. Losses need all queries at some points, and all
pixels of the few queries that are matched: both are cheaper than B x Q full masks and their gradients, and at batch 16
and 10 predictions these would be gigabytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seg_app.models.points import sample_maps


class QueryMasks:
    """Mask logits as embeddings and features.

    Args:
        embedded: (B, Q, C).
        features: (B, C, h, w), shared by all layers.
    """

    def __init__(self, embedded: Tensor, features: Tensor) -> None:
        self.embedded, self.features = embedded, features

    def all(self) -> Tensor:
        """(B, Q, h, w)."""
        masks = torch.bmm(self.embedded, self.features.flatten(2).to(self.embedded.dtype))
        return masks.view(*masks.shape[:2], *self.features.shape[-2:])

    def at(self, points: Tensor) -> Tensor:
        """All queries at (B, P, 2) points of their image: (B, Q, P) float32, for no_grad code."""
        if self.features.shape[2] * self.features.shape[3] <= 1.5 * points.shape[1]:
            return sample_maps(self.all().float(), points)  # more points than pixels
        return torch.bmm(self.embedded.float(), sample_maps(self.features.float(), points))

    def chosen(self, queries: Sequence[Tensor]) -> Tensor:
        """Masks of some queries of each image, one image after the other: (N, 1, h, w) float32."""
        device, size = self.features.device, self.features.shape[-2:]
        rows = [
            embedded[which.to(device, non_blocking=True)] @ features.flatten(1).to(embedded.dtype)
            for embedded, features, which in zip(self.embedded, self.features, queries)
        ]
        return torch.cat(rows).float().view(-1, 1, *size)


class GivenMasks:
    """The same for masks (B, Q, h, w) that exist."""

    def __init__(self, masks: Tensor) -> None:
        self.masks = masks

    def at(self, points: Tensor) -> Tensor:
        return sample_maps(self.masks.float(), points)

    def chosen(self, queries: Sequence[Tensor]) -> Tensor:
        device = self.masks.device
        rows = [masks[which.to(device, non_blocking=True)] for masks, which in zip(self.masks, queries)]
        return torch.cat(rows)[:, None].float()


def query_masks(masks: Tensor | QueryMasks) -> QueryMasks | GivenMasks:
    """What losses ask, whichever of the two a decoder gave."""
    return GivenMasks(masks) if isinstance(masks, Tensor) else masks
