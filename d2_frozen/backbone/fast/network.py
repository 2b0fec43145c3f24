"""Which network computes the maps of a frozen backbone?

In: the backbone, a precision, a device.  Out: a module with the same maps. It shares the backbone's tensors where
neither precision, nor device, nor folding changes them, so that float32 needs no second copy of the weights.

- Swin and SwinV2: swin.py.
- Others: batch norms and layer scales go into the layers before them (folding.py), where that is exact.
- What is not known runs as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from d2_frozen.backbone.fast.folding import folded_copy
from d2_frozen.backbone.fast.sharing import convert_tensors, with_shared_tensors
from d2_frozen.backbone.fast.swin import fast_swin

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@torch.no_grad()
def fast_network(inner: nn.Module, precision: str, device: torch.device) -> nn.Module:
    """A module that gives the maps of ``inner``, in eval mode, for float32 images on ``device``.

    Its outputs have the dtype of the precision. It must be made again when a tensor of ``inner`` changes.
    """
    network = fast_swin(inner) or folded_copy(inner) or inner
    dtype = PRECISIONS[precision]
    if dtype == torch.float32:
        return network
    if network is inner:
        network = with_shared_tensors(inner)
    return _Converted(network, dtype, device)


class _Converted(nn.Module):
    """A network in another precision, or on another device, than its weights came in."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        convert_tensors(network, lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype))
        self.network = network
        self.dtype = dtype

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {name: (B, C, h, w)} in ``dtype``."""
        return self.network(images.to(self.dtype))
