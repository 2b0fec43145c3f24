"""Which ground truth box does each prediction belong to, and is it foreground? Also in TorchScript."""

import torch
from torch import Tensor


class Matcher:
    """Gives every prediction its best ground truth, and a label by the quality of that match.

    Qualities between two neighbouring thresholds share a label: with thresholds (0.3, 0.7) and labels
    (0, -1, 1), what is below 0.3 is background, from 0.3 to below 0.7 ignored, from 0.7 on foreground.
    """

    def __init__(
        self, thresholds: list[float], labels: list[int], allow_low_quality_matches: bool = False
    ) -> None:
        """
        Args:
            thresholds: increasing, above 0.
            labels: one more than thresholds: 0 background, -1 ignored, 1 foreground.
            allow_low_quality_matches: the best predictions of each ground truth become foreground however bad
                they are (Faster R-CNN, arXiv:1506.01497, section 3.1.2, case i).
        """
        bounds = [-float("inf")] + list(thresholds) + [float("inf")]
        assert len(thresholds) > 0 and thresholds[0] > 0, (
            f"matching thresholds must be above 0, got {thresholds}"
        )
        assert bounds == sorted(bounds), f"matching thresholds must increase, got {thresholds}"
        assert len(labels) == len(bounds) - 1, (
            f"{len(thresholds)} thresholds need one label more, got {labels}"
        )
        assert all([label in [-1, 0, 1] for label in labels]), f"labels are -1, 0 or 1, got {labels}"
        self.thresholds = bounds
        self.labels = list(labels)
        self.allow_low_quality_matches = allow_low_quality_matches

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            match_quality_matrix: (M, N), not negative: e.g. IoU of M ground truth boxes and N predictions.
        Returns:
            matches: (N,) int64, the ground truth of each prediction (0 when there is none at all).
            match_labels: (N,) int8.
        """
        assert match_quality_matrix.dim() == 2, f"a (M, N) matrix is needed, got {match_quality_matrix.shape}"
        num_predictions = match_quality_matrix.shape[1]
        if match_quality_matrix.numel() == 0:
            matches = match_quality_matrix.new_zeros([num_predictions], dtype=torch.int64)
            # Without ground truth every quality is below the first threshold.
            return matches, matches.new_full([num_predictions], self.labels[0], dtype=torch.int8)
        assert (match_quality_matrix >= 0).all(), "match qualities must not be negative (or nan)"

        best, matches = match_quality_matrix.max(dim=0)
        match_labels = torch.full_like(matches, self.labels[0], dtype=torch.int8)
        for threshold, label in zip(self.thresholds[1:-1], self.labels[1:]):
            match_labels.masked_fill_(best >= threshold, label)
        if self.allow_low_quality_matches:
            self.set_low_quality_matches_(match_labels, match_quality_matrix)
        return matches, match_labels

    def set_low_quality_matches_(self, match_labels: Tensor, match_quality_matrix: Tensor) -> None:
        """Label the best predictions of every ground truth, ties included, as foreground, in place.

        ``matches`` stays: such a prediction may belong to another ground truth that it fits better.
        """
        best_of_each_gt = match_quality_matrix.amax(dim=1, keepdim=True)
        match_labels.masked_fill_((match_quality_matrix == best_of_each_gt).any(dim=0), 1)
