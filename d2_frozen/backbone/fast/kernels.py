"""Which implementation of a Swin block's parts runs? Triton kernels where they compile and agree, else torch's own.

CUDA: triton_kernels.py, tried once for each precision, window and head.  CPU, and CUDA without Triton: fused attention
of torch, one call for each kind of window.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)


def attend_by_torch(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kinds: Sequence[tuple[int, int]], scale: float
) -> Tensor:
    """softmax(scale q k' + bias) v inside each window.

    Args:
        q, k, v: (windows, heads, N, d), windows sorted by kind.
        bias: (K, heads, N, N).
        kinds: (kind, how many windows).
    Returns:
        (windows * N, heads * d).
    """
    outs, start = [], 0
    for kind, count in kinds:
        part = slice(start, start + count)
        out = F.scaled_dot_product_attention(
            q[part], k[part], v[part], attn_mask=bias[kind : kind + 1], scale=scale
        )
        outs.append(out.transpose(1, 2).flatten(0, 1).flatten(1))
        start += count
    return outs[0] if len(outs) == 1 else torch.cat(outs)


@cache
def kernels_work(device: torch.device, dtype: torch.dtype, length: int, width: int) -> bool:
    """Do Triton's kernels run here, and give what torch gives? Why they do not is logged, once.

    Args:
        length: of a window, in tokens.
        width: of a head.
    """
    if device.type != "cuda":
        return False
    try:
        error = kernel_difference(device, dtype, length, width)
    except Exception as reason:  # whatever goes wrong inside a compiler must not stop the training
        logger.warning(
            "Window attention on %s in %s: torch's, since Triton's kernel does not run here (%s: %s).",
            device,
            dtype,
            type(reason).__name__,
            str(reason).strip().split("\n")[0][:200],
        )
        return False
    if not error <= (1e-4 if dtype == torch.float32 else 3e-2):
        logger.warning(
            "Window attention on %s in %s: torch's, since Triton's kernel is wrong by %.2g here.",
            device,
            dtype,
            error,
        )
        return False
    return True


@torch.no_grad()
def kernel_difference(device: torch.device, dtype: torch.dtype, length: int, width: int) -> float:
    """Largest difference of the kernels to float64, on a small case with padding, both kinds of attention."""
    from d2_frozen.backbone.fast.triton_kernels import add_normalised, attend_in_windows

    heads, windows, tokens = 2, 3, 2 * length + 1
    numbers = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=numbers, dtype=torch.float64).to(dtype).double()

    qkv, padding_qkv = draw(tokens, 3 * heads * width), draw(3 * heads * width)
    bias, scale = draw(2, heads, length, length), torch.tensor([0.5, 2.0], dtype=torch.float64)
    places = torch.full((windows, length), -1)
    places.view(-1)[torch.randperm(windows * length, generator=numbers)[:tokens]] = torch.arange(tokens)
    kinds = ((0, 1), (1, 2))
    rows = torch.where(places[..., None] < 0, padding_qkv, qkv[places.clamp(min=0)])
    q, k, v = rows.view(windows, length, 3, heads, width).permute(2, 0, 3, 1, 4)
    worst = 0.0
    for cosine in (False, True):
        scaled = (F.normalize(q, dim=-1) if cosine else q) * scale[:, None, None]
        keys = F.normalize(k, dim=-1) if cosine else k
        exact = attend_by_torch(scaled, keys, v, bias, kinds, 1.0)[(places >= 0).flatten()]
        exact = exact[places[places >= 0].argsort()]
        got = attend_in_windows(
            qkv.to(device, dtype),
            padding_qkv.to(device, dtype),
            places.int().to(device),
            torch.tensor([0, 1, 1], dtype=torch.int32, device=device),
            bias.to(device, dtype),
            scale.float().to(device),
            cosine,
        )
        worst = max(worst, (got.double().cpu() - exact).abs().max().item())
    x, y, weight, shift = draw(5, 24), draw(5, 24), draw(24), draw(24)
    exact = x + F.layer_norm(y, (24,), weight, shift, 1e-5)
    low = [t.to(device, dtype) for t in (x, y, weight, shift)]
    got = add_normalised(low[0], low[1], low[2], low[3], 1e-5)
    return max(worst, (got.double().cpu() - exact).abs().max().item())
