"""Read ``.pkl`` weights without running what is inside.

A pickle is a program; this reader lets it build numpy arrays and plain containers and nothing else.
"""

from __future__ import annotations

import _codecs
import collections
import pickle
from collections.abc import Callable
from typing import IO, Any

import numpy as np

__all__ = ["UnsafePickleError", "load_pickle"]


class UnsafePickleError(pickle.UnpicklingError):
    """A pickle asks for a Python object beyond arrays and containers."""


def load_pickle(stream: IO[bytes], filename: str) -> Any:
    """Content of a pickle of Python 2 or 3 that holds arrays, numbers, text and containers.

    Args:
        stream: open for reading, binary.
        filename: for the messages.
    Raises:
        UnsafePickleError: it holds anything else; the message names it.
        ValueError: the file is damaged or no pickle.
    """
    # Python 2 wrote array bytes as text; latin1 maps each byte to the character of the same number.
    reader = _Reader(stream, encoding="latin1")
    reader.filename = filename
    try:
        return reader.load()
    except UnsafePickleError:
        raise
    except Exception as err:  # the standard reader raises whatever the bytes lead to
        raise ValueError(
            f"{filename} cannot be read as a pickle ({type(err).__name__}: {err}). It may be cut off: "
            "compare its size with the original's, and fetch it again."
        ) from err


def _bytes_of_text(text: str, encoding: str = "latin1") -> bytes:
    """Stands in for ``_codecs.encode``, which would import any codec by name."""
    if encoding.lower() not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text in the encoding {encoding!r}, expected latin1")
    return _codecs.encode(text, "latin1")


def _numpy_functions() -> dict[tuple[str, str], Callable[..., Any]]:
    """The functions that array pickles name: numpy 1 and numpy 2 have them in different modules."""
    admitted: dict[tuple[str, str], Any] = {}
    array = np.empty(0, dtype=np.float32)
    for value in (array, np.float32(0)):
        function = value.__reduce__()[0]
        for core in ("numpy.core.multiarray", "numpy._core.multiarray"):
            admitted[core, function.__name__] = function
    from_buffer = array.__reduce_ex__(5)[0]  # protocol 5
    for core in ("numpy.core.numeric", "numpy._core.numeric"):
        admitted[core, from_buffer.__name__] = from_buffer
    return admitted


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _bytes_of_text,
    **_numpy_functions(),
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (bytearray, bytes, complex, dict, frozenset, list, set, tuple)
    },
}


class _Reader(pickle.Unpickler):
    filename = ""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise UnsafePickleError(
                f"{self.filename} asks for {module}.{name}. Weights in .pkl files may hold numpy arrays and "
                "plain containers only; anything else could run code. If you trust the file, convert it to "
                ".safetensors elsewhere."
            ) from None

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError(f"{self.filename} refers to an object outside the file ({pid!r}).")
