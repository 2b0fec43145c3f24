"""Linear layers whose weights lie in memory as oneDNN multiplies them: low precision on CPU.

torch's own layer brings the weight into that order at each call, and copies the bias into the result first. Frozen
weights need the first once, and the second never; GELU goes into the same operation.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)


class PackedLinear(nn.Module):
    """gelu(W x + b), or without GELU."""

    def __init__(self, layer: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        # Not a buffer: what moves or converts tensors does not know this layout.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        self.bias = layer.bias
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        attribute, algorithm = ("gelu", "none") if self.gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, attribute, [], algorithm)


def pack(layer: nn.Linear, gelu: bool = False) -> nn.Module:
    """A packed layer where this torch and this processor have it and it agrees; else the layer (and GELU) as it is."""
    if packing_works(layer.weight.dtype):
        return PackedLinear(layer, gelu)
    return nn.Sequential(layer, nn.GELU()) if gelu else layer


_works: dict[torch.dtype, bool] = {}


def packing_works(dtype: torch.dtype) -> bool:
    """Is oneDNN there for this precision, and does it give what torch gives? Tried once."""
    if dtype not in _works:
        _works[dtype] = dtype in (torch.bfloat16, torch.float16) and _agrees(dtype)
    return _works[dtype]


@torch.no_grad()
def _agrees(dtype: torch.dtype) -> bool:
    supported: Any = getattr(
        torch.ops.mkldnn, f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported", None
    )
    try:
        if supported is None or not supported():
            return False
        layer = nn.Linear(48, 33).to(dtype)
        x = torch.linspace(-2, 2, 5 * 48).view(5, 48).to(dtype)
        exact = F.gelu(F.linear(x.float(), layer.weight.float(), layer.bias.float()))
        error = (PackedLinear(layer, gelu=True)(x).float() - exact).abs().max().item()
    except (
        RuntimeError,
        AttributeError,
        NotImplementedError,
    ) as reason:  # operators of torch that may change
        logger.info("Linear layers in %s are not packed: %s", dtype, str(reason).splitlines()[0][:200])
        return False
    return error < 0.03
