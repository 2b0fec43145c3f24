"""MODEL.FROZEN.COMPILE: the same network with less between its large operations.

- Swin on CUDA: its kernels are fused already; what is left is the time that Python takes to start them, so that each
  image size is recorded as a graph (graphs.py).
- Swin on CPU: what lies between the GEMM of queries, keys and values and attention becomes one loop, as does SwinV2's
  norm with its residual. (Of Swin, whose norm comes behind the sum, such a loop takes 1.2 of the time of torch's two
  operations in float32, and 0.95 in bfloat16.) Loops take any number of tokens: the first size with whole windows
  compiles, the first with padded ones does, and no other.
- Everything else: torch.compile of the whole, with weights as constants on CPU. The second size compiles again, for any
  size; on CPU single images have a graph of their own, and some more where they are so small that torch chooses other
  convolutions. After 8 of them torch runs uncompiled what none of them fits.
"""

from __future__ import annotations

import logging
import os
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2_frozen.backbone.fast.graphs import GraphPerSize
from d2_frozen.backbone.fast.layouts import WindowLayout
from d2_frozen.backbone.fast.swin import Block, FastSwin

logger = logging.getLogger(__name__)


def compiled_network(network: Any, device: torch.device) -> nn.Module:
    """``network`` compiled for ``device``; its weights must not change any more.

    Raises:
        RuntimeError: there is no C++ compiler, which CPU needs.
    """
    if device.type == "cpu":
        _require_compiler()
    if not isinstance(network, FastSwin):
        return _CompiledWhole(network)
    if device.type == "cuda":
        return GraphPerSize(network)
    loops: dict[tuple, _Loops] = {}
    any_rows = AnyRows()
    for block in network.blocks():
        key = (block.heads, block.width, block.cosine)
        if key not in loops:
            loops[key] = _Loops(any_rows, *key)
        block.loops = loops[key]
    return network


class _CompiledWhole(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.compiled: Any = torch.compile(network)
        # Images of one size are the usual case. With the second size comes a graph for any: if torch found out by
        # itself which sides vary, it would take several.
        self._first_shape: torch.Size | None = None
        self._broken = False

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {name: (B, C, h, w)}."""
        if self._first_shape is None:
            self._first_shape = images.shape
        elif images.shape != self._first_shape:
            for axis in (0, 2, 3):
                torch._dynamo.maybe_mark_dynamic(images, axis)
        if self._broken:
            return self.network(images)
        try:
            with torch._inductor.config.patch(freezing=images.device.type == "cpu"):
                return self.compiled(images)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as reason:  # whatever goes wrong inside a compiler must not stop the training
            # Seen: torch 2.14, ConvNeXt in float32 on CPU, single images of a second size.
            self._broken = True
            logger.warning(
                "MODEL.FROZEN.COMPILE: from here on the network runs uncompiled, as torch.compile failed on images of "
                "%s (%s).",
                tuple(images.shape),
                _in_words(reason),
            )
        return self.network(images)


class _Loops:
    """The loops of blocks of one width."""

    def __init__(self, any_rows: AnyRows, heads: int, width: int, cosine: bool) -> None:
        def queries_keys_values(
            qkv: Tensor, into: Tensor, padding: Tensor | None, bias: Tensor | None, scale: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            rows = qkv[into]
            if padding is not None:
                rows = torch.where(padding[:, None], torch.zeros_like(qkv[0]) if bias is None else bias, rows)
            q, k, v = rows.view(-1, 3, heads, width).unbind(1)
            if cosine:
                q_long = q.float().square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
                k_long = k.float().square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
                q, k = q.float() * (scale[:, None] / q_long), k.float() / k_long
            return q.to(qkv.dtype).contiguous(), k.to(qkv.dtype).contiguous(), v.contiguous()

        def add_normalised(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
            return x + F.layer_norm(y, (heads * width,), weight, bias, eps)

        self._queries_keys_values = any_rows.compiled(queries_keys_values)
        self._add_normalised = any_rows.compiled(add_normalised)

    def queries_keys_values(self, block: Block, qkv: Tensor, layout: WindowLayout) -> tuple[Tensor, ...]:
        """(B * h * w, 3 C) -> three of (windows, heads, N, d)."""
        parts = self._queries_keys_values(
            mark_any_rows(qkv),
            mark_any_rows(layout.into),
            mark_any_rows(layout.padding),
            block.qkv.bias,
            block.head_scale,
        )
        length = block.window[0] * block.window[1]
        return tuple(t.view(-1, length, block.heads, block.width).transpose(1, 2) for t in parts)

    def add_normalised(self, x: Tensor, y: Tensor, norm: nn.LayerNorm) -> Tensor:
        """x + norm(y), (B * h * w, C)."""
        return self._add_normalised(mark_any_rows(x), mark_any_rows(y), norm.weight, norm.bias, norm.eps)


class AnyRows:
    """torch.compile for functions of one network whose tensors vary in their number of rows.

    Such tensors go through :func:`mark_any_rows` at each call. Where one of the functions cannot be compiled, all run
    as they are.
    """

    def __init__(self) -> None:
        self._broken = False

    def compiled(self, function: Callable) -> Callable:
        """With a code object of its own: what is compiled for one width does not count for another."""
        own: Any = types.FunctionType(
            function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
        )
        compiled = torch.compile(own)

        def call(*arguments: Any) -> Any:
            if not self._broken:
                try:
                    return compiled(*arguments)
                except torch.cuda.OutOfMemoryError:
                    raise
                except Exception as reason:
                    # Seen: no room for its files, or a TMPDIR that allows no code (noexec).
                    self._broken = True
                    logger.warning(
                        "MODEL.FROZEN.COMPILE: from here on the network runs uncompiled, as torch.compile failed (%s). "
                        "It keeps its files in TORCHINDUCTOR_CACHE_DIR, or under TMPDIR.",
                        _in_words(reason),
                    )
            return function(*arguments)

        return call


def _in_words(reason: Exception) -> str:
    """Class and first line; and of a compiler that was started, the line that says error."""
    lines = str(reason).strip().splitlines() or [""]
    errors = [line.strip() for line in lines[1:] if "error:" in line]
    return ": ".join([type(reason).__name__, lines[0][:200], *[line[-200:] for line in errors[:1]]])


def mark_any_rows(tensor: Any) -> Any:
    """The same tensor or None; what is compiled for it takes any number of rows."""
    if tensor is not None:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor


def _require_compiler() -> None:
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++") if name]
    if not any(shutil.which(name) for name in names):
        raise RuntimeError(
            f"MODEL.FROZEN.COMPILE needs a C++ compiler on CPU, but there is none of {', '.join(names)}. Install one "
            "(apt install g++), or set MODEL.FROZEN.COMPILE to False."
        )
