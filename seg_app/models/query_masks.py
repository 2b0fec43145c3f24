"""Masks of the queries, before anybody asked for all their pixels.

A mask is the product of a query's embedding with the map of features. Losses need all queries at some points, and all
pixels of the few queries that are matched: both are cheaper than B x Q full masks and their gradients, and at batch 16
and 10 predictions these would be gigabytes.

They ask for the masks of several decoder layers at once (:func:`masks_of_layers`): ten layers, one after the other,
would keep a GPU waiting for Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seg_app.models.points import sample_maps


class QueryMasks:
    """Mask logits of one layer as embeddings and features.

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


class MadeOfQueries:
    """Masks of L layers, made where they are asked for.

    Args:
        layers: of the same features.
    """

    def __init__(self, layers: Sequence[QueryMasks]) -> None:
        self.embedded = torch.stack([one.embedded for one in layers])  # (L, B, Q, C)
        self.features = layers[0].features

    def at(self, points: Tensor) -> Tensor:
        """All queries at (L, B, P, 2) points of their image: (L, B, Q, P) float32, for no_grad code."""
        (L, B, Q, C), P = self.embedded.shape, points.shape[2]
        if self.features.shape[2] * self.features.shape[3] <= 1.5 * P:  # more points than pixels
            by_image = self.embedded.transpose(0, 1).reshape(B, L * Q, C)
            masks = QueryMasks(by_image, self.features).all().float()
            masks = masks.view(B, L, Q, *masks.shape[2:]).transpose(0, 1).flatten(0, 1)
            return sample_maps(masks, points.flatten(0, 1)).view(L, B, Q, P)
        sampled = sample_maps(self.features.float(), points.transpose(0, 1).flatten(1, 2))  # (B, C, L * P)
        sampled = sampled.view(B, C, L, P).permute(2, 0, 1, 3)
        return torch.matmul(self.embedded.float(), sampled)

    def chosen(self, queries: Sequence[Tensor]) -> Tensor:
        """Masks of some queries of each image, (L, n) numbers on the masks' device: (L, all n, h, w) float32."""
        rows = []
        for features, embedded, which in zip(self.features, self.embedded.unbind(1), queries):
            some = embedded.gather(1, which[..., None].expand(-1, -1, embedded.shape[2]))  # (L, n, C)
            rows.append(some @ features.flatten(1).to(some.dtype))
        return torch.cat(rows, dim=1).float().unflatten(2, self.features.shape[-2:])


class Given:
    """The same of masks that exist: L times (B, Q, h, w)."""

    def __init__(self, layers: Sequence[Tensor]) -> None:
        self.masks = torch.stack(list(layers))

    def at(self, points: Tensor) -> Tensor:
        sampled = sample_maps(self.masks.flatten(0, 1).float(), points.flatten(0, 1))
        return sampled.view(*self.masks.shape[:3], -1)

    def chosen(self, queries: Sequence[Tensor]) -> Tensor:
        layer = torch.arange(len(self.masks), device=self.masks.device)[:, None]
        rows = [masks[layer, which] for masks, which in zip(self.masks.unbind(1), queries)]
        return torch.cat(rows, dim=1).float()


def numbers_per_point(masks: Any) -> int:
    """How many numbers ``at`` takes for each point of an image, for one layer of either kind."""
    if isinstance(masks, Tensor):
        return masks.shape[0] * masks.shape[1]
    B, Q, C = masks.embedded.shape
    return B * max(Q, C)


def masks_of_layers(masks: Sequence[Any]) -> MadeOfQueries | Given:
    """What losses ask, whichever of the two a decoder gave in its layers: tensors (B, Q, h, w), or QueryMasks."""
    return Given(masks) if isinstance(masks[0], Tensor) else MadeOfQueries(masks)
