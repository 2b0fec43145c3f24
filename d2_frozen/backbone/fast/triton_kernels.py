"""Window attention, and a norm with its residual, as one Triton kernel each: between GEMMs nothing is stored twice.

Importing this needs Triton, which comes with torch's CUDA builds on Linux. Both kernels compute in float32.

Attention reads queries, keys and values of a window where they lie in the map, normalises them (SwinV2), and writes its
result where it belongs in the map: roll, padding, partition, and all inverses are index arithmetic.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of a kernel as its own)

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Widths of a head that the kernel takes: what a tensor core multiplies at once, or a multiple.
HEAD_WIDTHS = (16, 32, 64, 128)


def attend_in_windows(
    qkv: Tensor,
    padding_qkv: Tensor | None,
    places: Tensor,
    kinds: Tensor,
    bias: Tensor,
    scale: Tensor,
    cosine: bool,
) -> Tensor:
    """softmax(scale q k' + bias) v inside each window, q and k normalised if ``cosine``.

    Args:
        qkv: (tokens, 3 * heads * d), in the order of the map.
        padding_qkv: (3 * heads * d,) of places without token; None for 0.
        places: (windows, N) int32: the token at each place; -1 for padding.
        kinds: (windows,) int32: which of the K biases.
        bias: (K, heads, N, N).
        scale: (heads,) float32.
    Returns:
        (tokens, heads * d).
    """
    windows, length = places.shape
    heads = bias.shape[1]
    width = qkv.shape[1] // (3 * heads)
    assert width in HEAD_WIDTHS and qkv.is_contiguous() and bias.is_contiguous() and places.is_contiguous()
    out = torch.empty(qkv.shape[0], heads * width, dtype=qkv.dtype, device=qkv.device)
    block = min(64, max(16, triton.next_power_of_2(length)))
    grid = (windows * heads, triton.cdiv(length, block))
    with _on(qkv.device):
        _attend[grid](
            qkv,
            qkv if padding_qkv is None else padding_qkv,
            places,
            kinds,
            bias,
            scale,
            out,
            HEADS=heads,
            D=width,
            N=length,
            BLOCK=block,
            COSINE=cosine,
            PADDING=padding_qkv is not None,
            PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
            num_warps=4,
        )
    return out


def add_normalised(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x + layer_norm(y), (rows, C) each."""
    assert x.is_contiguous() and y.is_contiguous() and x.shape == y.shape
    rows, channels = x.shape
    width = triton.next_power_of_2(channels)
    block = max(1, min(32, 2048 // width))
    out = torch.empty_like(x)
    with _on(x.device):
        _add_normalised[(triton.cdiv(rows, block),)](
            x, y, weight, bias, out, rows, eps, C=channels, WIDTH=width, ROWS=block, num_warps=4
        )
    return out


def _on(device: torch.device) -> AbstractContextManager:
    # Triton launches on the current device, whatever device the tensors are on.
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@triton.jit
def _rows(qkv, padding_qkv, place, ok, channel, C: tl.constexpr, PADDING: tl.constexpr):
    """(rows, D) of q, k or v in float32: a token's, or those of padding."""
    real = ok & (place >= 0)
    at = place.to(tl.int64)[:, None] * (3 * C) + channel[None, :]
    read = tl.load(qkv + at, mask=real[:, None], other=0.0).to(tl.float32)
    if PADDING:
        empty = ok & (place < 0)
        read += tl.load(
            padding_qkv + channel[None, :] + 0 * place[:, None], mask=empty[:, None], other=0.0
        ).to(tl.float32)
    return read


@triton.jit
def _attend(
    qkv,
    padding_qkv,
    places,
    kinds,
    bias,
    scale,
    out,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    COSINE: tl.constexpr,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Heads of a window run side by side: their rows share cache lines.
    window = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    C: tl.constexpr = HEADS * D
    kind = tl.load(kinds + window)
    factor = tl.load(scale + head).to(tl.float32)
    channel = head * D + tl.arange(0, D)
    query = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    query_ok = query < N
    query_place = tl.load(places + window * N + query, mask=query_ok, other=-1)
    q = _rows(qkv, padding_qkv, query_place, query_ok, channel, C, PADDING)
    if COSINE:
        q = q * (factor / tl.maximum(tl.sqrt(tl.sum(q * q, axis=1)), 1e-12))[:, None]
    else:
        q = q * factor
    q = q.to(out.dtype.element_ty)

    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, D), tl.float32)
    biases = bias + (kind * HEADS + head).to(tl.int64) * (N * N)
    for first in tl.static_range(0, N, BLOCK):
        key = first + tl.arange(0, BLOCK)
        key_ok = key < N
        key_place = tl.load(places + window * N + key, mask=key_ok, other=-1)
        k = _rows(qkv, padding_qkv, key_place, key_ok, channel + C, C, PADDING)
        if COSINE:
            k = k * (1.0 / tl.maximum(tl.sqrt(tl.sum(k * k, axis=1)), 1e-12))[:, None]
        k = k.to(out.dtype.element_ty)
        v = _rows(qkv, padding_qkv, key_place, key_ok, channel + 2 * C, C, PADDING).to(out.dtype.element_ty)
        both = query_ok[:, None] & key_ok[None, :]
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        logits += tl.load(biases + query[:, None] * N + key[None, :], mask=both, other=0.0).to(tl.float32)
        logits = tl.where(key_ok[None, :], logits, float("-inf"))
        new_most = tl.maximum(most, tl.max(logits, axis=1))
        fading = tl.exp(most - new_most)
        weights = tl.exp(logits - new_most[:, None])
        total = total * fading + tl.sum(weights, axis=1)
        mixed = mixed * fading[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        most = new_most
    mixed = mixed / total[:, None]
    at = query_place.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=(query_ok & (query_place >= 0))[:, None])


# A number of rows that changes with the image size must not bring a compilation of its own.
@triton.jit(do_not_specialize=["rows"])
def _add_normalised(
    x, y, weight, bias, out, rows, eps, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    channel_ok = channel < C
    ok = (row < rows)[:, None] & channel_ok[None, :]
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    read = tl.load(y + at, mask=ok, other=0.0).to(tl.float32)
    mean = tl.sum(read, axis=1) / C
    centred = tl.where(channel_ok[None, :], read - mean[:, None], 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    normed = centred * spread[:, None]
    normed = normed * tl.load(weight + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    normed += tl.load(bias + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    result = normed + tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=ok)
