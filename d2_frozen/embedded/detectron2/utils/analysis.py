"""What does a model cost: parameters, multiply-adds, activations; and which parameters does a loss not reach?

fvcore does the counting, on a traced forward pass; models here take lists of dicts, which a trace cannot, so
an adapter hands it the image tensors alone.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from fvcore.nn import ActivationCountAnalysis as _FvcoreActivationCount
from fvcore.nn import FlopCountAnalysis as _FvcoreFlopCount
from fvcore.nn import parameter_count, parameter_count_table
from torch import nn

__all__ = [
    "FlopCountAnalysis",
    "activation_count_operators",
    "find_unused_parameters",
    "flop_count_operators",
    "parameter_count",
    "parameter_count_table",
]

_Batch = list[dict[str, Any]]


class FlopCountAnalysis(_FvcoreFlopCount):
    """fvcore's counter for a detection model in evaluation mode; one multiply-add counts as one.

    Operators that fvcore has no rule for (element-wise ones, NMS, ROIAlign) count as nothing. In
    ``by_module()`` the model itself is called "model".

    Args:
        inputs: what the model takes: ``[{"image": (C, H, W), ...}, ...]``.
    """

    def __init__(self, model: nn.Module, inputs: _Batch) -> None:
        super().__init__(*_traceable(model, inputs))
        self.unsupported_ops_warnings(False)
        self.uncalled_modules_warnings(False)
        self.tracer_warnings("none")


class _ActivationCount(_FvcoreActivationCount):
    def __init__(self, model: nn.Module, inputs: _Batch) -> None:
        super().__init__(*_traceable(model, inputs))
        self.unsupported_ops_warnings(False)
        self.uncalled_modules_warnings(False)
        self.tracer_warnings("none")


def flop_count_operators(model: nn.Module, inputs: _Batch) -> dict[str, float]:
    """Operator -> billions of multiply-adds, for one call of the model; it is counted in evaluation mode."""
    with _evaluation_mode(model):
        return _in_units_of(1e9, FlopCountAnalysis(model, inputs).by_operator())


def activation_count_operators(model: nn.Module, inputs: _Batch) -> dict[str, float]:
    """Operator -> millions of output elements of convolutions and matrix products, in evaluation mode."""
    with _evaluation_mode(model):
        return _in_units_of(1e6, _ActivationCount(model, inputs).by_operator())


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        # One by one: parts of a model in training may be in evaluation mode on purpose.
        for module, before in training.items():
            module.training = before


def _in_units_of(unit: float, counts: Mapping[str, float]) -> dict[str, float]:
    return defaultdict(float, {name: count / unit for name, count in counts.items()})


def find_unused_parameters(model: nn.Module, inputs: Any) -> list[str]:
    """Names of the trainable parameters that get no gradient from the losses of one training step.

    Raises:
        ValueError: the model is not in training mode.
    """
    if not model.training:
        raise ValueError("the model is in evaluation mode, where it has no losses: call model.train() first.")
    for parameter in model.parameters():
        parameter.grad = None
    losses = model(inputs)
    total = sum(losses.values()) if isinstance(losses, Mapping) else losses
    total.backward()
    unused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    for parameter in model.parameters():
        parameter.grad = None
    return unused


def _traceable(model: nn.Module, inputs: _Batch) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first.")
    return _ImagesIn(model, inputs), tuple(item["image"] for item in inputs)


class _ImagesIn(nn.Module):
    """Takes the image tensors, gives all tensors of the model's output."""

    def __init__(self, model: nn.Module, inputs: _Batch) -> None:
        super().__init__()
        self.model = model
        self._others = [{name: value for name, value in item.items() if name != "image"} for item in inputs]

    def forward(self, *images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        batch = [{**other, "image": image} for other, image in zip(self._others, images)]
        with torch.no_grad():
            return tuple(_tensors(self.model(batch)))


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif hasattr(output, "get_fields"):  # Instances
        yield from _tensors(output.get_fields())
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
    elif isinstance(getattr(output, "tensor", None), torch.Tensor):  # Boxes, BitMasks
        yield output.tensor
