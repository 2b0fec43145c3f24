"""What lies between the GEMMs of a Swin network, as one Triton kernel each: nothing is stored twice.

Importing this needs Triton, which comes with torch's CUDA builds on Linux. All kernels compute in float32.

- Attention reads queries, keys and values of a window where they lie in the map, normalises them (SwinV2), and writes
  its result where it belongs in the map: roll, padding, partition, and all inverses are index arithmetic.
- A norm, alone or with the residual that it is added to.
- Patches of images, embedded and normalised; 2 x 2 tokens side by side; maps with channels first.
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


def normalised(y: Tensor, weight: Tensor, bias: Tensor, eps: float, x: Tensor | None = None) -> Tensor:
    """layer_norm(y), and x + layer_norm(y) where there is an x; (rows, C) each."""
    assert y.is_contiguous() and (x is None or (x.is_contiguous() and x.shape == y.shape))
    rows, channels = y.shape
    out = torch.empty_like(y)
    width, block = _tile(channels)
    with _on(y.device):
        _normalised[(triton.cdiv(rows, block),)](
            y if x is None else x,
            y,
            weight,
            bias,
            out,
            rows,
            eps,
            C=channels,
            WIDTH=width,
            ROWS=block,
            RESIDUAL=x is not None,
            num_warps=4,
        )
    return out


def embed_patches(
    images: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    """layer_norm(convolution with a stride as long as its kernel), tokens in the order of the map.

    Args:
        images: (B, planes, H, W) in any precision; rows and columns beyond a whole patch are left out.
        weight: (C, planes, P, P); its precision is that of the product and of the result.
        bias, norm_weight, norm_bias: (C,).
    Returns:
        (B * H // P * W // P, C).
    """
    batch, planes, height, width = images.shape
    channels, patch = weight.shape[0], weight.shape[2]
    assert (
        images.is_contiguous() and weight.is_contiguous() and weight.shape == (channels, planes, patch, patch)
    )
    tokens = batch * (height // patch) * (width // patch)
    out = torch.empty(tokens, channels, dtype=weight.dtype, device=images.device)
    block = 64
    with _on(images.device):
        _embed_patches[(triton.cdiv(tokens, block),)](
            images,
            weight,
            bias,
            norm_weight,
            norm_bias,
            out,
            tokens,
            height,
            width,
            eps,
            PLANES=planes,
            PATCH=patch,
            NUMBERS=max(16, triton.next_power_of_2(planes * patch * patch)),
            C=channels,
            WIDTH=max(16, triton.next_power_of_2(channels)),
            ROWS=block,
            PRECISION="ieee" if weight.dtype == torch.float32 else "tf32",
            num_warps=4,
        )
    return out


def merge_patches(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B * ceil(H / 2) * ceil(W / 2), 4 C): 2 x 2 tokens side by side, column by column; 0 outside."""
    batch, height, width, channels = x.shape
    assert x.is_contiguous()
    rows = batch * -(-height // 2) * -(-width // 2)
    out = torch.empty(rows, 4 * channels, dtype=x.dtype, device=x.device)
    across, block = _tile(channels)
    with _on(x.device):
        _merge_patches[(triton.cdiv(rows, block), 4)](
            x, out, rows, height, width, C=channels, WIDTH=across, ROWS=block, num_warps=4
        )
    return out


def channels_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, H * W, C) -> (B, C, H * W), contiguous, in another precision."""
    batch, places, channels = x.shape
    assert x.is_contiguous()
    out = torch.empty(batch, channels, places, dtype=dtype, device=x.device)
    block = 64
    # Places along the first axis of the grid: the others end at 65535.
    grid = (triton.cdiv(places, block), triton.cdiv(channels, block), batch)
    with _on(x.device):
        _channels_first[grid](x, out, places, channels, PLACES=block, CHANNELS=block, num_warps=4)
    return out


def _tile(channels: int) -> tuple[int, int]:
    """Of a kernel that goes over whole rows: a power of 2 that holds the channels, and how many rows at once."""
    width = triton.next_power_of_2(channels)
    return width, max(1, min(32, 2048 // width))


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
def _normalised(
    x,
    y,
    weight,
    bias,
    out,
    rows,
    eps,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    ok = (row < rows)[:, None] & (channel < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    result = _norm_of_rows(tl.load(y + at, mask=ok, other=0.0).to(tl.float32), weight, bias, eps, C, WIDTH)
    if RESIDUAL:
        result += tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _norm_of_rows(rows, weight, bias, eps, C: tl.constexpr, WIDTH: tl.constexpr):
    channel = tl.arange(0, WIDTH)
    ok = channel < C
    mean = tl.sum(rows, axis=1) / C
    centred = tl.where(ok[None, :], rows - mean[:, None], 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    normed = centred * spread[:, None] * tl.load(weight + channel, mask=ok, other=0.0).to(tl.float32)[None, :]
    return normed + tl.load(bias + channel, mask=ok, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["tokens"])
def _embed_patches(
    images,
    weight,
    bias,
    norm_weight,
    norm_bias,
    out,
    tokens,
    height,
    width,
    eps,
    PLANES: tl.constexpr,
    PATCH: tl.constexpr,
    NUMBERS: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token_ok = token < tokens
    columns = width // PATCH
    per_image = (height // PATCH) * columns
    image = token // per_image
    row = (token % per_image) // columns
    column = token % columns
    # A patch's numbers in the order of the weights: plane, row, column.
    number = tl.arange(0, NUMBERS)
    number_ok = number < PLANES * PATCH * PATCH
    plane = number // (PATCH * PATCH)
    down = number // PATCH % PATCH
    right = number % PATCH
    line = (image.to(tl.int64) * PLANES)[:, None] + plane[None, :]
    line = line * height + row[:, None] * PATCH + down[None, :]
    at = line * width + column[:, None] * PATCH + right[None, :]
    pixels = tl.load(images + at, mask=token_ok[:, None] & number_ok[None, :], other=0.0)
    channel = tl.arange(0, WIDTH)
    channel_ok = channel < C
    weights = tl.load(
        weight + channel[:, None] * (PLANES * PATCH * PATCH) + number[None, :],
        mask=channel_ok[:, None] & number_ok[None, :],
        other=0.0,
    )
    result = tl.dot(pixels.to(weights.dtype), tl.trans(weights), input_precision=PRECISION)
    result += tl.load(bias + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    result = _norm_of_rows(result, norm_weight, norm_bias, eps, C, WIDTH)
    to = token.to(tl.int64)[:, None] * C + channel[None, :]
    tl.store(out + to, result.to(out.dtype.element_ty), mask=token_ok[:, None] & channel_ok[None, :])


@triton.jit(do_not_specialize=["rows", "height", "width"])
def _merge_patches(x, out, rows, height, width, C: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    quarter = tl.program_id(1)
    columns = (width + 1) // 2
    line = row // columns  # of the result, over all images
    lines = (height + 1) // 2
    from_y = line % lines * 2 + quarter % 2
    from_x = row % columns * 2 + quarter // 2
    place = ((line // lines).to(tl.int64) * height + from_y) * width + from_x
    channel = tl.arange(0, WIDTH)
    ok = (row < rows)[:, None] & (channel < C)[None, :]
    inside = (from_y < height) & (from_x < width)
    read = tl.load(x + place[:, None] * C + channel[None, :], mask=ok & inside[:, None], other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * (4 * C) + quarter * C + channel[None, :], read, mask=ok)


@triton.jit
def _channels_first(x, out, places, channels, PLACES: tl.constexpr, CHANNELS: tl.constexpr):
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    image = tl.program_id(2).to(tl.int64)
    place_ok, channel_ok = place < places, channel < channels
    tile = tl.load(
        x + (image * places + place)[:, None] * channels + channel[None, :],
        mask=place_ok[:, None] & channel_ok[None, :],
        other=0.0,
    )
    to = (image * channels + channel)[:, None] * places + place[None, :]
    turned = tl.trans(tile).to(out.dtype.element_ty)
    tl.store(out + to, turned, mask=channel_ok[:, None] & place_ok[None, :])
