"""Outputs of a frozen backbone on disk: what they are known by, how they are stored, who reads and writes them."""

from d2_frozen.caching.features import FEATURES, SLOT, FeatureCache, Slot, Statistics
from d2_frozen.caching.keys import NotKeyable, entry_key, file_identity
from d2_frozen.caching.space import Space, spaces_in
from d2_frozen.caching.store import CacheFull, Store

__all__ = [
    "FEATURES",
    "SLOT",
    "CacheFull",
    "FeatureCache",
    "NotKeyable",
    "Slot",
    "Space",
    "Statistics",
    "Store",
    "entry_key",
    "file_identity",
    "spaces_in",
]
