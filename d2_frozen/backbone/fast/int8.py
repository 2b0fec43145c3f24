"""MODEL.FROZEN.PRECISION: int8. Linear layers multiply 8-bit numbers; all else runs in bfloat16.

In: a network in bfloat16.  Out: the same network, its linear layers quantised by torchao: weights once, per output
channel, activations at each call, per row. GPUs of compute capability 9.0 (Hopper) and later take 8-bit floats, others
integers.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2_frozen.backbone.fast.compiled import compiled_for_any_rows, mark_any_rows

logger = logging.getLogger(__name__)


def quantise(network: nn.Module, device: torch.device) -> None:
    """Quantise the linear layers of a network, in place.

    Raises:
        RuntimeError: torchao is not installed, or too old.
    """
    try:
        from torchao import quantization
    except ImportError as err:
        raise RuntimeError(
            "MODEL.FROZEN.PRECISION: int8 needs torchao, which cannot be imported. Run pip install torchao, or choose "
            "bf16."
        ) from err
    if device.type == "cpu":
        logger.warning(
            "MODEL.FROZEN.PRECISION: int8 is slower than bf16 on CPU (docs/speed.md); it is for comparing results."
        )
    floats = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    if floats:
        config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
    else:
        config = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(network, config)
    if device.type == "cuda":
        _fuse_quantisation(network)


class _Fused(nn.Module):
    """A quantised layer whose activations are quantised in one kernel."""

    def __init__(self, layer: nn.Linear, compiled: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.layer, self._compiled = layer, compiled

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(rows, in) -> (rows, out)."""
        return self._compiled(mark_any_rows(x), self.layer.weight, self.layer.bias)


def _fuse_quantisation(network: nn.Module) -> None:
    made: dict[tuple, Any] = {}
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                key = (child.in_features, child.out_features, child.bias is None)
                if key not in made:
                    made[key] = compiled_for_any_rows(_linear)
                setattr(parent, name, _Fused(child, made[key]))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)
