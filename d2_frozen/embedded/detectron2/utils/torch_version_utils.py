"""Is this torch new enough?"""

from __future__ import annotations

import torch
from torch.torch_version import TorchVersion


def min_torch_version(min_version: str) -> bool:
    """Whether torch is at least ``min_version``, e.g. "2.4" or "2.4.1"."""
    return TorchVersion(torch.__version__.split("+")[0]) >= min_version
