"""MODEL.FROZEN.COMPILE: the same network with less between its large operations.

CUDA, Swin: graphs.py (its kernels are fused already; what is left is the time that Python takes to start them).
Everything else: torch.compile, which needs a C++ compiler on CPU.
"""

from __future__ import annotations

from typing import Any

import torch

from d2_frozen.backbone.fast.graphs import GraphPerSize
from d2_frozen.backbone.fast.swin import FastSwin


def compiled_network(network: Any, device: torch.device) -> Any:
    """``network`` compiled for ``device``; its weights must not change any more."""
    if isinstance(network, FastSwin) and device.type == "cuda":
        return GraphPerSize(network)
    return torch.compile(network)
