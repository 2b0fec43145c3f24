"""Which implementation of a network's parts runs? Triton kernels where they compile and agree, else torch's own.

CUDA: triton_kernels.py, tried once for each precision, and attention for each window and head.  CPU, and CUDA without
Triton: torch's operators; fused attention of torch, one call for each kind of window.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def normalised(y: Tensor, norm: nn.Module, x: Tensor | None = None) -> Tensor:
    """norm(y), or x + norm(y); (rows, C) each."""
    if isinstance(norm, nn.LayerNorm) and row_kernels_work(y.device, y.dtype):
        from d2_frozen.backbone.fast import triton_kernels

        return triton_kernels.normalised(y, norm.weight, norm.bias, norm.eps, x)
    return norm(y) if x is None else x + norm(y)


def embed_patches(images: Tensor, projection: nn.Conv2d, norm: nn.Module) -> Tensor:
    """Patches through a convolution whose stride is its kernel, and a norm: (B, planes, H, W) -> (B * h * w, C).

    Images may have another precision than the network.
    """
    weight, bias = projection.weight, projection.bias
    kernel = images.is_contiguous() and row_kernels_work(images.device, weight.dtype)
    if kernel and bias is not None and isinstance(norm, nn.LayerNorm):
        from d2_frozen.backbone.fast import triton_kernels

        return triton_kernels.embed_patches(images, weight, bias, norm.weight, norm.bias, norm.eps)
    if weight.dtype != images.dtype:
        images = images.to(weight.dtype, memory_format=torch.channels_last)
    return norm(projection(images).permute(0, 2, 3, 1).flatten(0, 2))


def merge_patches(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B * ceil(H / 2) * ceil(W / 2), 4 C): 2 x 2 tokens side by side, column by column; 0 outside."""
    if row_kernels_work(x.device, x.dtype):
        from d2_frozen.backbone.fast import triton_kernels

        return triton_kernels.merge_patches(x)
    batch, height, width, channels = x.shape
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    x = x.view(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
    return x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(0, 2)


def contiguous(feature: Tensor, dtype: torch.dtype) -> Tensor:
    """A map in ``dtype``, contiguous, whatever layout the network computes in; in one pass."""
    last = feature.permute(0, 2, 3, 1) if feature.dim() == 4 else feature
    turned = last.is_contiguous() and not feature.is_contiguous()
    if turned and row_kernels_work(feature.device, feature.dtype):
        from d2_frozen.backbone.fast import triton_kernels

        return triton_kernels.channels_first(last.flatten(1, 2), dtype).view(feature.shape)
    if feature.dtype == dtype:
        return feature.contiguous()
    return torch.empty(feature.shape, dtype=dtype, device=feature.device).copy_(feature)


@cache
def attention_kernel_works(device: torch.device, dtype: torch.dtype, length: int, width: int) -> bool:
    """Does Triton's attention in windows run here, and give what torch's gives? Why it does not is logged, once.

    Args:
        length: of a window, in tokens.
        width: of a head.
    """
    return _agrees(
        "Window attention", device, dtype, lambda: attention_difference(device, dtype, length, width)
    )


@cache
def row_kernels_work(device: torch.device, dtype: torch.dtype) -> bool:
    """Do Triton's norms and copies run here, and give what torch's give? Why they do not is logged, once."""
    return _agrees("Norms and copies", device, dtype, lambda: row_difference(device, dtype))


def _agrees(what: str, device: torch.device, dtype: torch.dtype, difference: Callable[[], float]) -> bool:
    if device.type != "cuda":
        return False
    try:
        error = difference()
    except Exception as reason:  # whatever goes wrong inside a compiler must not stop the training
        logger.warning(
            "%s on %s in %s: torch's, since Triton's kernel does not run here (%s: %s).",
            what,
            device,
            dtype,
            type(reason).__name__,
            str(reason).strip().split("\n")[0][:200],
        )
        return False
    if not error <= (1e-4 if dtype == torch.float32 else 3e-2):
        logger.warning(
            "%s on %s in %s: torch's, since Triton's kernel is wrong by %.2g here.",
            what,
            device,
            dtype,
            error,
        )
        return False
    return True


@torch.no_grad()
def attention_difference(device: torch.device, dtype: torch.dtype, length: int, width: int) -> float:
    """Largest difference of the kernel to float64, on a small case with padding, both kinds of attention."""
    from d2_frozen.backbone.fast.triton_kernels import attend_in_windows

    heads, windows, tokens = 2, 3, 2 * length + 1
    numbers = torch.Generator().manual_seed(0)
    qkv = _draw(numbers, dtype, tokens, 3 * heads * width)
    padding_qkv = _draw(numbers, dtype, 3 * heads * width)
    bias = _draw(numbers, dtype, 2, heads, length, length)
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
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
    return worst


@torch.no_grad()
def row_difference(device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference of the other kernels to float64: odd sizes, channels that are no power of 2."""
    from d2_frozen.backbone.fast import triton_kernels

    numbers = torch.Generator().manual_seed(0)
    x, y = _draw(numbers, dtype, 5, 24), _draw(numbers, dtype, 5, 24)
    weight, shift = _draw(numbers, dtype, 24), _draw(numbers, dtype, 24)
    images, kernel = _draw(numbers, dtype, 2, 3, 9, 14), _draw(numbers, dtype, 24, 3, 4, 4) / 4
    tokens = _draw(numbers, dtype, 2, 3, 5, 24)

    def low(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype)

    normed = F.layer_norm(y, (24,), weight, shift, 1e-5)
    patches = F.conv2d(images, kernel, shift, stride=4).permute(0, 2, 3, 1).flatten(0, 2)
    norm = (low(weight), low(shift), 1e-5)
    pairs = (
        (triton_kernels.normalised(low(y), *norm), normed),
        (triton_kernels.normalised(low(y), *norm, low(x)), x + normed),
        (
            triton_kernels.embed_patches(images.float().to(device), low(kernel), low(shift), *norm),
            F.layer_norm(patches, (24,), weight, shift, 1e-5),
        ),
        (triton_kernels.merge_patches(low(tokens)), merge_patches(tokens)),
        (triton_kernels.channels_first(low(tokens).flatten(1, 2), dtype), tokens.flatten(1, 2).mT),
    )
    return max((got.double().cpu() - exact).abs().max().item() for got, exact in pairs)


def _draw(numbers: torch.Generator, dtype: torch.dtype, *size: int) -> Tensor:
    """Numbers that ``dtype`` has, in float64."""
    return torch.randn(*size, generator=numbers, dtype=torch.float64).to(dtype).double()
