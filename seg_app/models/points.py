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
    if (
        maps.device.type == "cpu"
        and maps.shape[1] > 8
        and not (torch.is_grad_enabled() and maps.requires_grad)
    ):
        return _sample_many_channels(maps, points)
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False).squeeze(3)


def _sample_many_channels(maps: Tensor, points: Tensor) -> Tensor:
    """On CPU, adding up rows of C numbers is several times faster than grid_sample's walk through each channel."""
    N, C, H, W = maps.shape
    cells, shares = _corners(points, H, W)
    tables = maps.flatten(2).transpose(1, 2)  # (N, H*W, C)
    rows = [
        F.embedding_bag(cell, table.contiguous(), mode="sum", per_sample_weights=share)
        for cell, table, share in zip(cells, tables, shares.to(maps.dtype))
    ]
    return torch.stack(rows).transpose(1, 2)


def _corners(points: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """The four pixels around points (..., P, 2): their numbers (..., P, 4), and shares, 0 for those outside."""
    x, y = points[..., 0] * W - 0.5, points[..., 1] * H - 0.5
    left, top = x.floor(), y.floor()
    right_share, lower_share = x - left, y - top
    left, top = left.long(), top.long()
    columns = torch.stack((left, left + 1), dim=-1)
    rows = torch.stack((top, top + 1), dim=-1)
    in_column = torch.stack((1 - right_share, right_share), dim=-1) * ((columns >= 0) & (columns < W))
    in_row = torch.stack((1 - lower_share, lower_share), dim=-1) * ((rows >= 0) & (rows < H))
    cells = (rows.clamp(0, H - 1) * W)[..., :, None] + columns.clamp(0, W - 1)[..., None, :]
    shares = in_row[..., :, None] * in_column[..., None, :]
    return cells.flatten(-2), shares.flatten(-2)


def sample_masks(masks: Tensor, chosen: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of some of many 0/1 masks, without a float copy of them; no gradients.

    Args:
        masks: (T, H, W) bool or any number.
        chosen: (N,) which mask.
        points: (N, P, 2).
    Returns:
        (N, P) float, dtype of points.
    """
    H, W = masks.shape[-2:]
    cells, shares = _corners(points, H, W)  # (N or 1, P, 4)
    values = masks.reshape(-1)[(chosen * (H * W))[:, None, None] + cells]
    return (values * shares).sum(-1)


def sample_all_masks(masks: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of (T, H, W) 0/1 masks at the same (P, 2) points: (T, P), dtype of points; no gradients."""
    H, W = masks.shape[-2:]
    cells, shares = _corners(points, H, W)  # (P, 4)
    flat = masks.flatten(1)
    total = points.new_zeros(len(masks), len(points))
    for cell, share in zip(cells.unbind(-1), shares.unbind(-1)):
        total += flat.index_select(1, cell) * share
    return total


def draw_candidates(
    masks: int, num_points: int, oversample_ratio: float, importance_ratio: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What chance gives for the points at which masks are compared; :func:`least_sure` chooses from it.

    Args:
        masks: N.
        num_points: P.
        oversample_ratio: candidates drawn uniformly, per wanted point.
        importance_ratio: share of the P that will be the candidates with logits nearest to 0.
    Returns:
        Candidates (N, n, 2), and points anywhere (N, p, 2).
    """
    candidates = torch.rand(masks, int(num_points * oversample_ratio), 2, device=device)
    anywhere = torch.rand(masks, num_points - int(importance_ratio * num_points), 2, device=device)
    return candidates, anywhere


@torch.no_grad()
def least_sure(masks: Tensor, candidates: Tensor, anywhere: Tensor, num_points: int) -> Tensor:
    """The candidates where the masks (N, 1, H, W) have logits nearest to 0, and the points anywhere: (N, P, 2)."""
    sure = sample_maps(masks, candidates).squeeze(1).abs()  # (N, n)
    wanted = num_points - anywhere.shape[1]
    best = sure.topk(wanted, dim=1, largest=False, sorted=False).indices
    return torch.cat((candidates.gather(1, best[..., None].expand(-1, -1, 2)), anywhere), dim=1)
