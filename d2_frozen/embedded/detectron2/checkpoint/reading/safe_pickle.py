"""Read ``.pkl`` weights without running what is inside.

A pickle is a program. This reader lets it build numpy arrays of numbers or text and plain containers, by
functions of its own, and nothing else. What it builds is bounded by the bytes that the file has.
"""

from __future__ import annotations

import collections
import io
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
    try:
        return _Reader(_BoundedStream(stream)).load()
    except UnsafePickleError as err:
        raise UnsafePickleError(
            f"{filename} {err}. Weights in .pkl files may hold numpy arrays and plain containers only; "
            "anything else could run code. If you trust the file, convert it to .safetensors elsewhere."
        ) from None
    except Exception as err:  # the reader raises whatever the bytes lead to, MemoryError included
        raise ValueError(
            f"{filename} cannot be read as a pickle ({type(err).__name__}: {err}). It is damaged, perhaps cut off: "
            "compare its size with the original's, and fetch it again."
        ) from err


class _BoundedStream:
    """A file that is asked for no more than it has: readers allocate first and look afterwards."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        start = stream.tell()
        self.size = self._left = stream.seek(0, io.SEEK_END) - start
        stream.seek(start)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._left:
            raise EOFError(f"asks for {size} bytes, {self._left} are left")
        return self._count(self._stream.read(size))

    def readline(self) -> bytes:
        return self._count(self._stream.readline())

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


# Numbers and text, with their bytes or characters: "f4", "b1", "<U12". No objects, no structures.
_TYPE_CODE = re.compile(r"[<>|=]?[biufcSU]\d{1,6}")
_CONTAINERS = (dict, frozenset, list, set, tuple)


class _Dtype:
    """A numpy dtype in the making: a type code, then perhaps a byte order."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        text = _as_text(code)
        if not (isinstance(text, str) and _TYPE_CODE.fullmatch(text)):
            raise UnsafePickleError(f"has an array of type {_shown(code)}")
        self.dtype = np.dtype(text)

    def set_state(self, state: Any) -> None:
        # numpy's own __setstate__ believes every field and can be made to corrupt memory: take the order
        # alone.
        order = _as_text(state[1])
        if order not in ("<", ">", "|", "="):
            raise UnsafePickleError(f"has an array of byte order {_shown(order)}")
        self.dtype = self.dtype.newbyteorder(order)


class _NdarrayName:
    """Where a pickle names numpy.ndarray; it never gets the class."""


class _StandIns:
    """What a pickle may call, by other functions than it thinks.

    A few bytes of a pickle can ask for a long thing again and again; honest ones do not. So all that is made here
    together may take little more memory than the file has bytes.
    """

    def __init__(self, file_size: int) -> None:
        self._memory_left = 4 * file_size + 2**20

    def by_name(self) -> dict[tuple[str, str], Callable[..., Any]]:
        """(module, name) in the pickle -> what it gets."""
        names: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy", "ndarray"): _NdarrayName,
            ("numpy", "dtype"): _Dtype,
            ("collections", "OrderedDict"): self._container(collections.OrderedDict),
            ("_codecs", "encode"): self.bytes_of_text,
        }
        for core in ("numpy.core", "numpy._core"):  # numpy 1, numpy 2
            names[f"{core}.multiarray", "_reconstruct"] = _empty_array
            names[f"{core}.multiarray", "scalar"] = self.scalar
            names[f"{core}.numeric", "_frombuffer"] = self.array_from_buffer
        for builtins in ("builtins", "__builtin__"):  # Python 3, Python 2
            names[builtins, "complex"] = complex
            names[builtins, "bytes"], names[builtins, "bytearray"] = self.bytes_of, self.bytearray_of
            for kind in _CONTAINERS:
                names[builtins, kind.__name__] = self._container(kind)
        return names

    def set_array_state(self, array: np.ndarray, state: Sequence[Any]) -> None:
        """Fill an array of ``_empty_array`` in place, since it may be referred to already."""
        # A second content would free memory that rows taken from the first one still point to.
        if array.size:
            raise UnsafePickleError("sets the content of an array twice")
        _, shape, dtype, fortran, data = state
        values = self._values(dtype, data, _length(shape)).reshape(shape, order="F" if fortran else "C")
        # The state now comes from a real array of a checked type and size.
        array.__setstate__(values.__reduce__()[2])

    def array_from_buffer(
        self,
        data: Any,
        dtype: _Dtype,
        shape: Sequence[int],
        order: str,
        axis_order: Sequence[int] | None = None,
    ) -> np.ndarray:
        values = self._values(dtype, data, _length(shape))
        if order == "K" and axis_order is not None:
            return values.reshape(shape).transpose(axis_order)
        return values.reshape(shape, order=order)

    def scalar(self, dtype: _Dtype, data: Any) -> Any:
        return self._values(dtype, data, 1)[0]

    def bytes_of_text(self, text: str, encoding: str = "latin1") -> bytes:
        """_codecs.encode, for the one encoding that pickles of bytes use; others would import their modules."""
        if encoding not in ("latin1", "latin-1"):
            raise UnsafePickleError(f"has text in the encoding {_shown(encoding)}")
        self._spend(len(text))
        return text.encode("latin1")

    def bytes_of(self, content: Any = b"", encoding: str = "latin1") -> bytes:
        """bytes and bytearray of what they copy; of a number they would make as many zeros."""
        if isinstance(content, str):
            return self.bytes_of_text(content, encoding)
        if not isinstance(content, bytes | bytearray):
            raise UnsafePickleError(f"makes bytes of {_shown(content)}")
        self._spend(len(content))
        return bytes(content)

    def bytearray_of(self, content: Any = b"", encoding: str = "latin1") -> bytearray:
        return bytearray(self.bytes_of(content, encoding))

    def _container(self, kind: Callable[..., Any]) -> Callable[..., Any]:
        def make(content: Any = ()) -> Any:
            if not isinstance(content, _CONTAINERS):
                raise UnsafePickleError(f"makes a {kind.__name__} of {_shown(content)}")
            self._spend(8 * len(content))
            return kind(content)

        return make

    def _values(self, dtype: _Dtype, data: Any, count: int) -> np.ndarray:
        """``count`` values, as a new array of one axis."""
        stored = dtype.dtype
        if not isinstance(data, str | bytes | bytearray):
            raise ValueError(f"an array's content is a {type(data).__name__}")
        if len(data) != count * stored.itemsize:
            raise ValueError(f"{len(data)} bytes for {count} values of {stored}")
        # Empty texts are no bytes in the file, but one each in memory.
        self._spend(count * max(1, stored.itemsize))
        if not stored.itemsize:
            return np.zeros(count, stored)
        if isinstance(data, str):  # Python 2 wrote bytes as text
            data = data.encode("latin1")
        # A copy, since the bytes are read-only; in this machine's byte order, which torch wants.
        return np.frombuffer(data, stored).astype(stored.newbyteorder("="))

    def _spend(self, size: int) -> None:
        self._memory_left -= size
        if self._memory_left < 0:
            raise UnsafePickleError("makes far more of its content than it holds")


def _empty_array(*_: Any) -> np.ndarray:
    """numpy's _reconstruct: content follows by ``set_array_state``."""
    return np.empty(0, np.int8)


def _length(shape: Any) -> int:
    """Number of values. Of anything but plain numbers, prod could make something long."""
    if not (isinstance(shape, tuple | list) and all(type(side) is int and side >= 0 for side in shape)):
        raise ValueError("an array's shape is no tuple of numbers")
    return math.prod(shape)


def _as_text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _shown(value: Any) -> str:
    """For messages. Nested containers would make a text of exponential length."""
    return repr(value[:80]) if isinstance(value, str | bytes) else f"a {type(value).__name__}"


class _Reader(pickle._Unpickler):  # type: ignore[name-defined]
    """The Python version of the standard reader: in the C version BUILD cannot be replaced."""

    dispatch = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, stream: _BoundedStream) -> None:
        # Python 2 wrote array bytes as text; latin1 maps each byte to the character of the same number.
        super().__init__(stream, encoding="latin1")
        self._stand_ins = _StandIns(stream.size)
        self._names = self._stand_ins.by_name()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._names[module, name]
        except KeyError:
            raise UnsafePickleError(f"asks for {module[:80]}.{name[:80]}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError(f"refers to an object outside the file ({_shown(pid)})")

    def get_extension(self, code: int) -> None:
        raise UnsafePickleError(f"refers to the registered extension {code}")

    def load_build(self) -> None:
        """The opcode that gives an object its state: three kinds of object have any."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, _Dtype):
            target.set_state(state)
        elif type(target) is np.ndarray:
            self._stand_ins.set_array_state(target, state)
        elif (
            type(target) is collections.OrderedDict
            and isinstance(state, dict)
            and set(state) <= {"_metadata"}
        ):
            target.__dict__.update(state)  # torch's state dicts carry it this way
        else:
            raise UnsafePickleError(f"sets the state of a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self) -> None:
        """The standard one makes the array before it looks whether the file has as much."""
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
