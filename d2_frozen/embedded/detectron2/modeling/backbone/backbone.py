"""What is a backbone? Images in, named feature maps out, and a description of both."""

from __future__ import annotations

import copy
from abc import ABCMeta, abstractmethod

import torch
from torch import nn

from detectron2.layers import ShapeSpec


class Backbone(nn.Module, metaclass=ABCMeta):
    """Base of every network that :func:`build_backbone` may return.

    A subclass either fills ``_out_features`` (names, in order), ``_out_feature_channels`` and
    ``_out_feature_strides`` (dicts by name), or overrides :meth:`output_shape`.
    """

    @abstractmethod
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, C, H, W) normalised images -> {name: (B, C_name, H / stride, W / stride)}."""

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input, in pixels, must be multiples of this. 0 or 1: any size will do."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """More wishes about padding, for ``ImageList.from_tensors``.

        ``square_size``: pad to a square with this side in pixels (0: no). ``size_divisibility``: as the
        property of that name.
        """
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride (input pixels per cell) of each output."""
        channels, strides = self._out_feature_channels, self._out_feature_strides
        return {name: ShapeSpec(channels=channels[name], stride=strides[name]) for name in self._out_features}

    def _with_module_lists(self, *names: str) -> Backbone:
        """A copy that shares everything, for TorchScript: it cannot read a Python list of modules.

        Args:
            names: attributes with such lists, which are ModuleLists in the copy.
        """
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        for name in names:
            setattr(twin, name, nn.ModuleList(getattr(self, name)))
        return twin
