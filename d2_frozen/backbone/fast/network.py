"""Which network computes the maps of a frozen backbone?

In: the backbone, a precision, a device.  Out: a module with the same maps. It shares the backbone's tensors where
neither precision, nor device, nor folding changes them, so that float32 needs no second copy of the weights.

- Swin and SwinV2: swin.py.
- Others: batch norms and layer scales go into the layers before them (folding.py), where that is exact. In low
  precision convolutions read and write maps with channels last, as oneDNN and cuDNN want it: 0.41 of the time that
  ResNet-50 takes without it on CPU.
- What is not known runs as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from d2_frozen.backbone.fast.compiled import compiled_network
from d2_frozen.backbone.fast.folding import folded_copy
from d2_frozen.backbone.fast.sharing import convert_tensors, with_shared_tensors
from d2_frozen.backbone.fast.swin import FastSwin, fast_swin

# Of everything but the linear layers: "int8" and "fp8" have these in 8 bits.
PRECISIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.bfloat16,
    "fp8": torch.bfloat16,
}
EIGHT_BITS = ("int8", "fp8")


@torch.no_grad()
def fast_network(inner: nn.Module, precision: str, device: torch.device, compile: bool = False) -> nn.Module:
    """A module that gives the maps of ``inner``, in eval mode, for float32 images on ``device``.

    Its outputs have the dtype of the precision. It must be made again when a tensor of ``inner`` changes.
    """
    swin = fast_swin(inner)
    network = swin or folded_copy(inner) or inner
    dtype = PRECISIONS[precision]
    if dtype != torch.float32:
        network = with_shared_tensors(inner) if network is inner else network
        convert_tensors(network, device, dtype)
        if precision in EIGHT_BITS:
            _quantise(network, precision, device)
        elif swin is not None and device.type == "cpu":
            for block in swin.blocks():
                block.pack()
        if swin is None:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile:
        network = compiled_network(network, device)
    # Swin reads the images as they are, patch by patch.
    return network if dtype == torch.float32 or swin is not None else _InPrecision(network, dtype)


def _quantise(network: nn.Module, precision: str, device: torch.device) -> None:
    from d2_frozen.backbone.fast.quantised import quantise

    quantise(network, precision, device)
    if isinstance(network, FastSwin):
        for block in network.blocks():
            block.gelu = False  # it would go into a GEMM of bfloat16


class _InPrecision(nn.Module):
    def __init__(self, network: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {name: (B, C, h, w)} in ``dtype``."""
        return self.network(images.to(self.dtype, memory_format=torch.channels_last))
