"""Swin and SwinV2 without what is constant, for a network that does not train.

In: a :class:`TimmBackbone` on timm's Swin or SwinV2 (SwinV2-G too).  Out: the same maps from fewer operations:

- SwinV2's position bias (a small network and 16 sigmoid) and logit scale (clamp, exp) are numbers, computed once;
  so is Swin's look-up in its table, and the masks of shifted windows.
- Roll, padding, window partition and their inverses are one gather before and one behind attention (layouts.py).
- Attention is fused (kernels.py).

Weights are those of the network, not copies, where precision and device are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import Mlp
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

from d2_frozen.backbone.fast.kernels import (
    attend_by_torch,
    attention_kernel_works,
    embed_patches,
    merge_patches,
    normalised,
)
from d2_frozen.backbone.fast.layouts import Bounded, Size, WindowLayout, window_layout, window_masks
from d2_frozen.backbone.fast.packed import pack
from d2_frozen.backbone.fast.sharing import with_shared_tensors
from d2_frozen.backbone.swin_v2 import PadsBeforeShift, SwinBlock, SwinV2Block
from d2_frozen.backbone.swin_v2_giant import BlockWithMainNorm
from d2_frozen.backbone.timm_backbone import TimmBackbone

# Layouts of this many sizes are kept: one is a few index numbers per token.
_KEPT_SIZES = 16


# What is known here; another class may do something else.
_BLOCKS = (SwinTransformerBlock, SwinTransformerV2Block, SwinBlock, SwinV2Block, BlockWithMainNorm)


def fast_swin(backbone: nn.Module) -> FastSwin | None:
    """The fast network of a :class:`TimmBackbone` on Swin or SwinV2; None for any other backbone."""
    network: Any = getattr(backbone, "network", None)
    if not isinstance(backbone, TimmBackbone) or not isinstance(network, SwinTransformer | SwinTransformerV2):
        return None
    stages: Any = network.layers
    known = all(type(b) in _BLOCKS and _is_plain_mlp(b.mlp) for stage in stages for b in stage.blocks)
    # A copy, since its modules are partly those of the backbone, and will get tensors in another precision.
    return with_shared_tensors(FastSwin(backbone)) if known else None


class FastSwin(nn.Module):
    """The maps of a Swin network at any image size."""

    stages: Any  # a ModuleList of _Stage

    def __init__(self, backbone: TimmBackbone) -> None:
        super().__init__()
        network, indices = backbone.network, backbone.map_indices
        self.stem = _PatchEmbedding(network.patch_embed)
        self.stages = nn.ModuleList(_Stage(stage) for stage in network.layers[: max(indices.values()) + 1])
        self.final_norm = backbone.final_norm
        self._feature_of = {index: name for name, index in indices.items()}
        self._layouts: Bounded[list[list[WindowLayout]]] = Bounded(_KEPT_SIZES)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {name: (B, C, h, w)}, in memory channels last."""
        return self.run(images, self.prepare(images))

    def blocks(self) -> Iterator[Block]:
        """All blocks in the order of the forward pass."""
        for stage in self.stages:
            yield from stage.blocks

    def prepare(self, images: Tensor) -> list[list[WindowLayout]]:
        """The layout of each block for images of this size."""
        batch, _, height, width = images.shape
        size = (height // self.stem.patch[0], width // self.stem.patch[1])
        key = (batch, size, images.device)
        return self._layouts.get(key, lambda: self._all_layouts(batch, size, images.device))

    def run(self, images: Tensor, layouts: list[list[WindowLayout]]) -> dict[str, Tensor]:
        """As :meth:`forward`, with what :meth:`prepare` gave."""
        batch, _, height, width = images.shape
        x = self.stem(images)  # (B * h * w, C)
        size = (height // self.stem.patch[0], width // self.stem.patch[1])
        maps = {}
        for index, stage in enumerate(self.stages):
            if stage.merging is not None:
                x, size = stage.merging(x, batch, size)
            for block, layout in zip(stage.blocks, layouts[index]):
                x = block(x, layout)
            if index in self._feature_of:
                name = self._feature_of[index]
                norm = self.final_norm if name == "res5" else None
                feature = x if norm is None else normalised(x, norm)
                maps[name] = feature.view(batch, *size, -1).permute(0, 3, 1, 2)
        return maps

    def _all_layouts(self, batch: int, size: Size, device: torch.device) -> list[list[WindowLayout]]:
        result = []
        for stage in self.stages:
            if stage.merging is not None:
                size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
            made: dict[tuple, WindowLayout] = {}
            for block in stage.blocks:
                key = (block.window, block.shift, block.pad_first)
                if key not in made:
                    made[key] = window_layout(batch, size, *key, device)
            result.append([made[block.window, block.shift, block.pad_first] for block in stage.blocks])
        return result


class _PatchEmbedding(nn.Module):
    """Non-overlapping patches: a linear layer on the pixels of each."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.patch: Size = tuple(embedding.patch_size)
        self.proj = embedding.proj
        self.norm = embedding.norm

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), float32 or in the network's precision -> (B * h * w, C)."""
        return embed_patches(images, self.proj, self.norm)


class _Merging(nn.Module):
    """2 x 2 tokens become one; SwinV2 normalises behind the reduction, Swin before it."""

    def __init__(self, merging: Any, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.reduction = merging.reduction
        self.norm = merging.norm

    def forward(self, x: Tensor, batch: int, size: Size) -> tuple[Tensor, Size]:
        """(B * h * w, C) -> (B * h/2 * w/2, 2 C), and the new (h, w)."""
        height, width = size
        x = merge_patches(x.view(batch, height, width, -1))
        if self.norm_first:
            x = self.reduction(normalised(x, self.norm))
        else:
            x = normalised(self.reduction(x), self.norm)
        return x, ((height + 1) // 2, (width + 1) // 2)


class _Stage(nn.Module):
    merging: _Merging | None
    blocks: Any  # a ModuleList of Block

    def __init__(self, stage: Any) -> None:
        super().__init__()
        first = stage.blocks[0]
        merges = not isinstance(stage.downsample, nn.Identity)
        norm_first = isinstance(first, SwinTransformerBlock)
        self.merging = _Merging(stage.downsample, norm_first) if merges else None
        self.blocks = nn.ModuleList(Block(block) for block in stage.blocks)


class Block(nn.Module):
    """One block of either network, on tokens in the order of the map."""

    in_float32 = ("head_scale",)  # a kernel reads it, and 100 in bfloat16 may be 0.2 off

    qkv: Any  # a linear layer; packed.py may put another in its place
    qk_scale: Tensor
    head_scale: Tensor
    bias: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        attention = block.attn
        self.cosine = isinstance(block, SwinTransformerV2Block)
        self.window: Size = tuple(block.window_size)
        self.shift: Size = tuple(block.shift_size)
        self.pad_first = isinstance(block, PadsBeforeShift)
        self.heads = attention.num_heads
        self.loops: Any = None  # compiled.py's
        self.qkv = _linear(attention.qkv.weight, _qkv_bias(attention))
        self.proj, self.fc1, self.fc2 = attention.proj, block.mlp.fc1, block.mlp.fc2
        self.act = block.mlp.act
        # torch's, or timm's, which is the same function.
        exact = type(self.act).__name__ == "GELU" and getattr(self.act, "approximate", "none") == "none"
        self.gelu = exact and self.fc1.bias is not None
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.norm3 = getattr(block, "norm3", None)  # SwinV2-G's, on the main branch
        self.width = self.proj.in_features // self.heads
        if self.cosine:
            scale = attention.logit_scale.clamp(max=math.log(100.0)).exp().flatten()  # (heads,)
            self.scale = 1.0
            self.register_buffer("qk_scale", torch.stack((scale, torch.ones_like(scale)))[..., None])
        else:
            self.scale = attention.scale
            scale = torch.full((self.heads,), self.scale, device=self.proj.weight.device)
        self.register_buffer("head_scale", scale)
        bias = _position_bias(attention, self.cosine)  # (1, heads, N, N)
        if any(self.shift):
            bias = bias + window_masks(self.window, self.shift).to(bias)[:, None]
        self.register_buffer("bias", bias)  # (1 or 4 kinds of windows, heads, N, N)

    def forward(self, x: Tensor, layout: WindowLayout) -> Tensor:
        """(B * h * w, C) -> the same."""
        known = attention_kernel_works(x.device, x.dtype, self.window[0] * self.window[1], self.width)
        attention = self.attention_by_kernel if known else self.attention
        if self.cosine:
            add = _add_normalised if self.loops is None else self.loops.add_normalised
            x = add(x, attention(x, layout), self.norm1)
            x = add(x, self.mlp(x), self.norm2)
        else:
            x = x + attention(normalised(x, self.norm1), layout)
            x = x + self.mlp(normalised(x, self.norm2))
        return x if self.norm3 is None else normalised(x, self.norm3)

    def pack(self) -> None:
        """Weights as oneDNN wants them, for low precision on CPU."""
        self.qkv, self.proj, self.fc2 = pack(self.qkv), pack(self.proj), pack(self.fc2)
        if self.gelu:
            self.fc1, self.act = pack(self.fc1, gelu=True), nn.Identity()

    def mlp(self, x: Tensor) -> Tensor:
        if self.gelu and x.is_cuda and x.dtype != torch.float32 and type(self.fc1) is nn.Linear:
            # GELU inside the GEMM: cuBLAS has the tanh form, which differs by less than low precision rounds.
            hidden = torch._addmm_activation(self.fc1.bias, x, self.fc1.weight.t(), use_gelu=True)
            return self.fc2(hidden)
        return self.fc2(self.act(self.fc1(x)))

    def attention(self, x: Tensor, layout: WindowLayout) -> Tensor:
        """(B * h * w, C) -> the same, each token from the tokens of its window."""
        if self.loops is not None:
            q, k, v = self.loops.queries_keys_values(self, self.qkv(x), layout)
        else:
            x = x[layout.into]
            if layout.padding is not None:
                x = x.masked_fill(layout.padding[:, None], 0.0)
            qkv = self.qkv(x).view(-1, self.window[0] * self.window[1], 3, self.heads, self.width)
            q, k, v = self._queries_keys_values(qkv)  # (windows, heads, N, d) each
        out = attend_by_torch(q, k, v, self.bias, layout.kinds, self.scale)
        return self.proj(out[layout.out_of])

    def attention_by_kernel(self, x: Tensor, layout: WindowLayout) -> Tensor:
        """As :meth:`attention`, by a kernel that finds the windows itself."""
        from d2_frozen.backbone.fast.triton_kernels import attend_in_windows

        padding = None if layout.padding is None else self.qkv.bias
        out = attend_in_windows(
            self.qkv(x), padding, layout.places, layout.kind_of, self.bias, self.head_scale, self.cosine
        )
        return self.proj(out)

    def _queries_keys_values(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.cosine:
            qk = qkv[:, :, :2]  # (windows, N, 2, heads, d)
            # float16 has nothing between 0 and 6e-8, and 100 / length must stay below 65504; keys of padding are 0.
            shortest = 2e-3 if qk.dtype == torch.float16 else 1e-12
            length = torch.linalg.vector_norm(qk, dim=-1, keepdim=True).clamp(min=shortest)
            q, k = (qk * (self.qk_scale / length)).permute(2, 0, 3, 1, 4)
        return q, k, v


def _add_normalised(x: Tensor, y: Tensor, norm: nn.LayerNorm) -> Tensor:
    return normalised(y, norm, x)


def _is_plain_mlp(mlp: Any) -> bool:
    return type(mlp) is Mlp and isinstance(mlp.fc1, nn.Linear) and isinstance(mlp.norm, nn.Identity)


def _qkv_bias(attention: Any) -> Tensor | None:
    if isinstance(getattr(attention, "q_bias", None), Tensor):  # SwinV2: keys have none
        return torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))
    return attention.qkv.bias


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer on tensors that exist."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _position_bias(attention: Any, cosine: bool) -> Tensor:
    """(1, heads, N, N): what relative positions add to the logits."""
    index = attention.relative_position_index
    if cosine:
        table = attention.cpb_mlp(attention.relative_coords_table).view(-1, attention.num_heads)
        table = 16 * torch.sigmoid(table)
    else:
        table = attention.relative_position_bias_table
    return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)[None].contiguous()
