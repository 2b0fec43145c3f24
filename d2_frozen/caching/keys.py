"""What are stored features known by? The file they come from, and what was done to its pixels.

Not the config and not the seed: an augmentation is first drawn, and the key has the numbers that were drawn (scale,
window, mirrored or not). Two runs that draw the same share an entry; a changed config, file or draw cannot hit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from enum import Enum
from typing import Any

import numpy as np
from fvcore.transforms.transform import Transform

KEY_BYTES = 16


class NotKeyable(TypeError):
    """A drawn augmentation holds something, such as a function, whose effect cannot be told from its value."""


def entry_key(path: str, draw: Any) -> bytes:
    """16 bytes that name what the backbone makes of a file after a draw.

    Args:
        path: an existing file or folder.
        draw: numbers, texts, arrays, fvcore transforms, dataclasses, and lists or dicts of them.
    Raises:
        FileNotFoundError: no such file.
        NotKeyable: see there.
    """
    text = f"{file_identity(path)}\n{canonical(draw)}"
    return hashlib.sha256(text.encode()).digest()[:KEY_BYTES]


def file_identity(path: str) -> str:
    """Absolute path, size and time of the last change; of a folder, those of all files in it.

    Not the content: to learn it the file would have to be read, which a hit is to save.
    """
    path = os.path.abspath(path)
    if not os.path.isdir(path):
        return _stamp(path, os.stat(path))
    with os.scandir(path) as entries:
        files = sorted((entry.name, entry.stat()) for entry in entries if entry.is_file())
    inside = "\n".join(_stamp(name, stat) for name, stat in files)
    return f"{path} {hashlib.sha256(inside.encode()).hexdigest()}"


def canonical(value: Any) -> str:
    """A text that is equal for equal values, in every process.

    Raises:
        NotKeyable: the value, or a part of it, has no such text.
    """
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return repr(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        digest = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return f"array({value.dtype.str}, {value.shape}, {digest})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(canonical, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{canonical(key)}: {canonical(one)}' for key, one in value.items()))}}}"
    if isinstance(value, Transform) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        kind = type(value)
        return f"{kind.__module__}.{kind.__qualname__}({canonical(vars(value))})"
    raise NotKeyable(f"a {type(value).__module__}.{type(value).__qualname__}: {value!r}")


def _stamp(name: str, stat: os.stat_result) -> str:
    return f"{name} {stat.st_size} {stat.st_mtime_ns}"
