"""Gram matrices of batches -> linear CKA of every pair of feature maps, with memory that does not grow with batches.

Method: Nguyen et al., "Do Wide and Deep Networks Learn the Same Things?", ICLR 2021, arXiv 2010.15327, section 2:

    CKA(X, Y) = sum_b HSIC_1(K_b, L_b) / sqrt(sum_b HSIC_1(K_b, K_b) * sum_b HSIC_1(L_b, L_b))

over batches b of n examples, K_b = X_b X_b^T and L_b = Y_b Y_b^T. HSIC_1 is the unbiased estimate of Song et al., JMLR
2012. It equals <A, B> / (n (n - 3)) for the U-centred K and L (Szekely and Rizzo, Annals of Statistics 2014), so each
matrix is centred once, whatever the number of pairs. All arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# HSIC_1 divides by n (n - 3).
MIN_EXAMPLES = 4
# Kinds of examples: see Gram.
IMAGE = "image"
# Batches are summed in so many groups, to tell how far the result depends on the images.
_GROUPS = 10
# Numbers that are converted to float64 at a time: 64 MiB.
_NUMBERS_AT_ONCE = 1 << 23
# What is left of a Gram matrix by centring, relative to it, where features are the same for all examples.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Gram:
    """Inner products of the examples of one batch in one feature map.

    Args:
        matrix: (n, n) float64.
        image_of: (n,) int64, which image of the batch each example belongs to.
        kind: two maps can be compared example by example if their kinds are equal: ``IMAGE``, or which RoIs.
    """

    matrix: Tensor
    image_of: Tensor
    kind: Hashable = IMAGE

    def of_images(self, images: Tensor) -> Tensor:
        """Inner products of the mean features of ``images`` (m,), each of which must have examples: (m, m)."""
        if self.kind == IMAGE:
            return self.matrix[images][:, images]
        belongs = (self.image_of == images[:, None]).to(self.matrix.dtype)
        mean = belongs / belongs.sum(1, keepdim=True)
        return mean @ self.matrix @ mean.t()


def gram_of_rows(rows: Tensor, numbers_at_once: int = _NUMBERS_AT_ONCE) -> Tensor:
    """(n, d) features of any floating dtype -> (n, n) float64 inner products, on the CPU.

    Args:
        numbers_at_once: of the features, converted to float64 at a time: with it memory does not depend on d.
    """
    total = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(max(1, numbers_at_once // max(1, len(rows))), dim=1):
        part = part.double()
        total.addmm_(part, part.t())
    return total.cpu()


def u_centred(matrix: Tensor) -> Tensor:
    """(n, n) symmetric, n > 2 -> the same without its diagonal, every row and column of which sums to 0.

    Zero where only rounding would be left, that is where all examples have the same features.
    """
    n = len(matrix)
    bare = matrix.clone().fill_diagonal_(0)
    rows = bare.sum(1)
    centred = bare - (rows[:, None] + rows) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    centred.fill_diagonal_(0)
    if centred.norm() <= _ROUNDING * matrix.norm():
        centred.zero_()
    return centred


class MinibatchCKA:
    """Sums over batches of the three HSIC_1 of every pair (x, y).

    A pair with other kinds of examples (RoIs and images, RoIs of two models) is compared image by image, by the means
    over each image's RoIs. Batches in which a pair has less than ``MIN_EXAMPLES`` examples do not count for it.

    Args:
        x, y: names of feature maps.
    """

    def __init__(self, x: Sequence[str], y: Sequence[str]) -> None:
        self.x, self.y = list(x), list(y)
        self.batches = np.zeros((len(self.x), len(self.y)), dtype=np.int64)
        # Per group: HSIC_1(K, L), HSIC_1(K, K), HSIC_1(L, L).
        self.sums = np.zeros((_GROUPS, 3, len(self.x), len(self.y)))
        self._seen = 0

    def update(self, x: Mapping[str, Gram], y: Mapping[str, Gram]) -> None:
        """Add one batch. Names that are not asked for are ignored, and missing ones leave out their pairs."""
        group = self.sums[self._seen % _GROUPS]
        self._seen += 1
        for kind_x, of_x in _by_kind(self.x, x).items():
            for kind_y, of_y in _by_kind(self.y, y).items():
                grams = [x[self.x[i]] for i in of_x], [y[self.y[j]] for j in of_y]
                if kind_x == kind_y:
                    matrices = [[gram.matrix for gram in side] for side in grams]
                else:
                    images = _images_of_both(grams[0][0], grams[1][0])
                    matrices = [[gram.of_images(images) for gram in side] for side in grams]
                if len(matrices[0][0]) < MIN_EXAMPLES:
                    continue
                place = np.ix_(of_x, of_y)
                group[:, place[0], place[1]] += _hsic(*matrices)
                self.batches[place] += 1

    def cka(self) -> np.ndarray:
        """(x, y) float64; NaN where a map is the same for all examples, or no batch counts."""
        return _ratio(self.sums.sum(0))

    def standard_error(self) -> np.ndarray:
        """(x, y): how far :meth:`cka` depends on the images, by the jackknife over groups of batches; NaN for one."""
        groups = min(self._seen, _GROUPS)
        if groups < 2:
            return np.full(self.batches.shape, np.nan)
        without_one = np.stack([_ratio(self.sums.sum(0) - of_group) for of_group in self.sums[:groups]])
        return np.sqrt((groups - 1) * without_one.var(axis=0))


def _by_kind(names: Sequence[str], grams: Mapping[str, Gram]) -> dict[Hashable, list[int]]:
    places: dict[Hashable, list[int]] = {}
    for i, name in enumerate(names):
        if name in grams:
            places.setdefault(grams[name].kind, []).append(i)
    return places


def _images_of_both(a: Gram, b: Gram) -> Tensor:
    present = a.image_of.unique()
    return present[torch.isin(present, b.image_of)]


def _hsic(x: Sequence[Tensor], y: Sequence[Tensor]) -> np.ndarray:
    """(n, n) matrices of two lists -> (3, x, y): HSIC_1 of x with y, x with x, y with y."""
    n = len(x[0])
    a, b = (torch.stack([u_centred(matrix).flatten() for matrix in side]) for side in (x, y))
    products = torch.stack(
        torch.broadcast_tensors(a @ b.t(), a.square().sum(1)[:, None], b.square().sum(1)[None])
    )
    return (products / (n * (n - 3))).numpy()


def _ratio(sums: np.ndarray) -> np.ndarray:
    xy, xx, yy = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        # After a subtraction, what should be 0 may be a little below it.
        return np.where((xx > 0) & (yy > 0), xy / np.sqrt(np.maximum(xx * yy, 0)), np.nan)
