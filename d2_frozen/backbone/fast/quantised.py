"""MODEL.FROZEN.PRECISION: int8 and fp8. Linear layers multiply 8-bit numbers; all else runs in bfloat16.

In: a network in bfloat16.  Out: the same network, its linear layers quantised by torchao: weights once, per output
channel, activations at each call, per row. int8 are integers, fp8 floats of 4 exponent and 3 mantissa bits (e4m3).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2_frozen.backbone.fast.compiled import AnyRows, mark_any_rows

# Ada and Hopper: the first GPUs that multiply 8-bit floats.
_FIRST_WITH_FP8 = (8, 9)
logger = logging.getLogger(__name__)


def quantise(network: nn.Module, precision: str, device: torch.device) -> None:
    """Quantise the linear layers of a network, in place.

    Args:
        precision: "int8" or "fp8".
    Raises:
        RuntimeError: torchao is not installed, or too old, or ``device`` has no 8-bit floats.
    """
    if precision == "fp8":
        _require_fp8(device)
    config = _torchao_config(precision)
    linear = [name for name, part in network.named_modules() if type(part) is nn.Linear]
    if not linear:
        logger.warning(
            "MODEL.FROZEN.PRECISION: %s is for linear layers, of which %s has none; it runs in bf16.",
            precision,
            getattr(network, "name", type(network).__name__),
        )
        return
    if device.type == "cpu" or precision == "fp8":
        logger.warning(
            "MODEL.FROZEN.PRECISION: %s is slower than bf16 here (docs/speed.md); it is for comparing results.",
            precision,
        )
    from torchao.quantization import quantize_

    quantize_(network, config)
    if device.type == "cuda":
        _fuse_quantisation(network)


def _torchao_config(precision: str) -> Any:
    try:
        from torchao import quantization
    except ImportError as err:
        raise RuntimeError(
            f"MODEL.FROZEN.PRECISION: {precision} needs torchao, which cannot be imported ({err}). Run pip install "
            "torchao, or choose bf16."
        ) from err
    # set_inductor_config=False: torchao would change settings of torch.compile for the whole process, heads included.
    try:
        if precision == "int8":
            return quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        return quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=quantization.PerRow(), set_inductor_config=False
        )
    except (AttributeError, TypeError) as err:
        import torchao

        raise RuntimeError(
            f"MODEL.FROZEN.PRECISION: {precision} needs a newer torchao than {torchao.__version__} ({err}). Run pip "
            "install --upgrade torchao, or choose bf16."
        ) from err


def _require_fp8(device: torch.device) -> None:
    where = "a GPU of compute capability 8.9 (Ada, Hopper) or later"
    if device.type != "cuda":
        raise RuntimeError(
            f"MODEL.FROZEN.PRECISION: fp8 needs {where}, but runs on {device.type}. Choose bf16."
        )
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < _FIRST_WITH_FP8:
        raise RuntimeError(
            f"MODEL.FROZEN.PRECISION: fp8 needs {where}; {torch.cuda.get_device_name(device)} has "
            f"{capability[0]}.{capability[1]}. Choose int8 or bf16."
        )


class _Fused(nn.Module):
    """A quantised layer whose activations are quantised in one kernel."""

    def __init__(self, layer: nn.Linear, compiled: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.layer, self._compiled = layer, compiled

    # Some networks call F.linear with their layers' tensors.
    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(.., in) -> (.., out)."""
        rows = x.reshape(-1, self.in_features)
        y = self._compiled(mark_any_rows(rows), self.layer.weight, self.layer.bias)
        return y.view(*x.shape[:-1], self.out_features)


def _fuse_quantisation(network: nn.Module) -> None:
    made: dict[tuple, Any] = {}
    any_rows = AnyRows()
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                key = (child.in_features, child.out_features, child.bias is None)
                if key not in made:
                    made[key] = any_rows.compiled(_linear)
                setattr(parent, name, _Fused(child, made[key]))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)
