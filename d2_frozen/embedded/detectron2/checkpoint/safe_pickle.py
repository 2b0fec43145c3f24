"""Read ``.pkl`` weights without running what is inside.

A pickle is a program. This reader lets it build numpy arrays of numbers or text and plain containers, by
functions of its own, and nothing else.
"""

from __future__ import annotations

import collections
import math
import pickle
import re
from collections.abc import Callable, Sequence
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
    try:
        return reader.load()
    except UnsafePickleError as err:
        raise UnsafePickleError(
            f"{filename} {err}. Weights in .pkl files may hold numpy arrays and plain containers only; "
            "anything else could run code. If you trust the file, convert it to .safetensors elsewhere."
        ) from None
    except Exception as err:  # the reader raises whatever the bytes lead to
        raise ValueError(
            f"{filename} cannot be read as a pickle ({type(err).__name__}: {err}). It may be cut off: "
            "compare its size with the original's, and fetch it again."
        ) from err


# Numbers and text, with their bytes or characters: "f4", "b1", "<U12". No objects, no structures.
_TYPE_CODE = re.compile(r"[<>|=]?[biufcSU]\d{1,6}")


class _Dtype:
    """A numpy dtype in the making: a type code, then perhaps a byte order."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        text = _as_text(code)
        if not (isinstance(text, str) and _TYPE_CODE.fullmatch(text)):
            raise UnsafePickleError(f"has an array of type {code!r}")
        self._dtype = np.dtype(text)

    def set_state(self, state: Any) -> None:
        # numpy's own __setstate__ believes every field and can be made to corrupt memory: take the order
        # alone.
        order = _as_text(state[1])
        if order not in ("<", ">", "|", "="):
            raise UnsafePickleError(f"has an array of byte order {order!r}")
        self._dtype = self._dtype.newbyteorder(order)

    def read(self, data: Any, count: int) -> np.ndarray:
        """``count`` values of this type, as a new array of one axis."""
        if isinstance(data, str):
            data = data.encode("latin1")
        if len(data) != count * self._dtype.itemsize:
            raise ValueError(f"{len(data)} bytes for {count} values of {self._dtype}")
        if not self._dtype.itemsize:  # empty text
            return np.zeros(count, self._dtype)
        # A copy, since the bytes are read-only; in this machine's byte order, which torch wants.
        return np.frombuffer(data, self._dtype).astype(self._dtype.newbyteorder("="))


def _as_text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


class _NdarrayName:
    """Where a pickle names numpy.ndarray; it never gets the class."""


# ---- stand-ins for the functions that numpy's pickles call


def _empty_array(*_: Any) -> np.ndarray:
    """numpy's _reconstruct: content follows by _set_array_state."""
    return np.empty(0, np.int8)


def _set_array_state(array: np.ndarray, state: Sequence[Any]) -> None:
    """Fill an array of ``_empty_array`` in place, since it may be referred to already."""
    _, shape, dtype, fortran, data = state
    values = dtype.read(data, math.prod(shape)).reshape(shape, order="F" if fortran else "C")
    # The state now comes from a real array of a checked type and size.
    array.__setstate__(values.__reduce__()[2])


def _scalar(dtype: _Dtype, data: Any) -> Any:
    return dtype.read(data, 1)[0]


def _array_from_buffer(
    data: Any, dtype: _Dtype, shape: Sequence[int], order: str, axis_order: Sequence[int] | None = None
) -> np.ndarray:
    values = dtype.read(bytes(data), math.prod(shape))
    if order == "K" and axis_order is not None:
        return values.reshape(shape).transpose(axis_order)
    return values.reshape(shape, order=order)


def _bytes_of_text(text: str, encoding: str = "latin1") -> bytes:
    """_codecs.encode, for the one encoding that pickles of bytes use; any other would import its module."""
    if encoding.lower() not in ("latin1", "latin-1"):
        raise UnsafePickleError(f"has text in the encoding {encoding!r}")
    return text.encode("latin1")


def _admitted() -> dict[tuple[str, str], Callable[..., Any]]:
    names: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _NdarrayName,
        ("numpy", "dtype"): _Dtype,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("_codecs", "encode"): _bytes_of_text,
    }
    for core in ("numpy.core", "numpy._core"):  # numpy 1, numpy 2
        names[f"{core}.multiarray", "_reconstruct"] = _empty_array
        names[f"{core}.multiarray", "scalar"] = _scalar
        names[f"{core}.numeric", "_frombuffer"] = _array_from_buffer
    for builtins in ("builtins", "__builtin__"):  # Python 3, Python 2
        for kind in (bytearray, bytes, complex, dict, frozenset, list, set, tuple):
            names[builtins, kind.__name__] = kind
    return names


class _Reader(pickle._Unpickler):  # type: ignore[name-defined]
    """The Python version of the standard reader: in the C version BUILD cannot be replaced."""

    _names = _admitted()
    dispatch = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._names[module, name]
        except KeyError:
            raise UnsafePickleError(f"asks for {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError(f"refers to an object outside the file ({pid!r})")

    def get_extension(self, code: int) -> None:
        raise UnsafePickleError(f"refers to the registered extension {code}")

    def load_build(self) -> None:
        """The opcode that gives an object its state: three kinds of object have any."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _Dtype):
            target.set_state(state)
        elif type(target) is np.ndarray:
            _set_array_state(target, state)
        elif type(target) is collections.OrderedDict and isinstance(state, dict):
            target.__dict__.update(state)  # torch's state dicts carry _metadata this way
        else:
            raise UnsafePickleError(f"sets the state of a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build
