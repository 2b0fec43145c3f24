"""Weights from a path or an address to ``{"model": {name: array}, ...}``, without running what is in the file.

These modules import each other relatively, and of ``detectron2`` only what the original has too: a project that runs
on the original can load this folder alone and reads files as safely there.
"""

from .formats import read_weights
from .location import local_copy, split_query
from .safe_pickle import UnsafePickleError, load_pickle

__all__ = ["UnsafePickleError", "load_pickle", "local_copy", "read_weights", "split_query"]
