"""The frozen forward: what is constant is computed once, the rest in the asked precision.

:func:`fast_network` is what :class:`FrozenBackbone` runs; the network itself, its names and weights stay as they are.
"""

from d2_frozen.backbone.fast.kernels import contiguous
from d2_frozen.backbone.fast.network import EIGHT_BITS, PRECISIONS, fast_network

__all__ = ["EIGHT_BITS", "PRECISIONS", "contiguous", "fast_network"]
