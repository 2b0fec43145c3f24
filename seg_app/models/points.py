"""Values of maps at points between their pixels, and the choice of the points at which masks are compared.

Points are (x, y) in 0..1 over the map; a pixel's centre is at (i + 0.5) / size; outside the map everything is 0.
Method: PointRend, arXiv 1912.08193, section 3.1; used for the losses in Mask2Former, arXiv 2112.01527, section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_maps(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values, with gradients.

    Args:
        maps: (N, C, H, W) float.
        points: (N, P, 2).
    Returns:
        (N, C, P).
    """
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False).squeeze(3)


def sample_masks(masks: Tensor, chosen: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of some of many 0/1 masks, without a float copy of them; no gradients.

    Args:
        masks: (T, H, W) bool or any number.
        chosen: (N,) which mask.
        points: (N, P, 2), or (1, P, 2) for all.
    Returns:
        (N, P) float, dtype of points.
    """
    T, H, W = masks.shape
    flat = masks.reshape(-1)
    first = chosen[:, None] * (H * W)
    x, y = points[..., 0] * W - 0.5, points[..., 1] * H - 0.5
    left, top = x.floor(), y.floor()
    right_share, lower_share = x - left, y - top
    left, top = left.long(), top.long()
    total = points.new_zeros(len(chosen), points.shape[1])
    for j, in_row in ((top, 1 - lower_share), (top + 1, lower_share)):
        in_row = in_row * ((j >= 0) & (j < H))
        row = j.clamp(0, H - 1) * W
        for i, in_column in ((left, 1 - right_share), (left + 1, right_share)):
            share = in_row * in_column * ((i >= 0) & (i < W))
            total += flat[first + (row + i.clamp(0, W - 1))] * share
    return total


@torch.no_grad()
def draw_uncertain_points(
    masks: Tensor, num_points: int, oversample_ratio: float, importance_ratio: float
) -> Tensor:
    """Points where the masks are least sure, and some anywhere.

    Args:
        masks: (N, 1, H, W) logits.
        num_points: P.
        oversample_ratio: candidates drawn uniformly, per wanted point.
        importance_ratio: share of the P that are the candidates with logits nearest to 0.
    Returns:
        (N, P, 2).
    """
    N = len(masks)
    draw = int(num_points * oversample_ratio)
    candidates = torch.rand(N, draw, 2, device=masks.device, dtype=masks.dtype)
    sure = sample_maps(masks, candidates).squeeze(1).abs()  # (N, draw)
    wanted = int(importance_ratio * num_points)
    best = sure.topk(wanted, dim=1, largest=False).indices
    points = candidates.gather(1, best[..., None].expand(-1, -1, 2))
    anywhere = torch.rand(N, num_points - wanted, 2, device=masks.device, dtype=masks.dtype)
    return torch.cat((points, anywhere), dim=1)
