"""Feature maps in a store: looked up where samples are made, read and written where the model runs.

In a loader's worker, :meth:`FeatureCache.look_up` turns a file and a draw into a :class:`Slot`, which says whether the
maps are there, and has checked them. In the process of the model, :meth:`FeatureCache.fetch` maps them into memory and
:meth:`FeatureCache.put` stores new ones, in a thread of its own.
"""

from __future__ import annotations

import json
import logging
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2_frozen.caching.keys import NotKeyable, entry_key
from d2_frozen.caching.store import CacheFull, Place, Store

logger = logging.getLogger(__name__)

# Keys of a sample: where its features are to be found or stored (a Slot), and, once mapped into memory, the maps
# themselves: {name: (rows, C, h, w)}.
SLOT = "feature_slot"
FEATURES = "features"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
_HEADER = struct.Struct("<I")
_ALIGN = 64
# Maps that wait for the disk; with more, the model waits too.
_WAITING_BYTES = 256 * 2**20


class Slot(NamedTuple):
    """What a sample brings along: the ``key`` of its features, and where they are (None: not there).

    ``about``: plain values that are stored beside the maps. ``note``: what went wrong, for the log.
    """

    key: bytes
    place: Place | None = None
    about: Mapping[str, Any] | None = None
    note: str = ""


@dataclass
class Statistics:
    """Of one process since the start: samples with and without stored features, blobs written, damaged ones seen."""

    hits: int = 0
    misses: int = 0
    written: int = 0
    written_bytes: int = 0
    damaged: int = 0
    not_keyable: int = 0
    full: str = field(default="")

    def hit_rate(self) -> float:
        """Share of samples whose features were there, 0 to 1; NaN before the first sample."""
        seen = self.hits + self.misses + self.not_keyable
        return self.hits / seen if seen else float("nan")


class FeatureCache:
    """
    Args:
        store: of one space.
        dtype: of the maps in it: "fp32", "bf16" or "fp16".
        names: which maps are stored.
        wants_pixels: read and augment images also where the features are there (for pictures).
    """

    def __init__(
        self, store: Store, dtype: str, names: Sequence[str] = (), wants_pixels: bool = False
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(
                f"MODEL.FROZEN.CACHE.DTYPE is {dtype!r}; choose one of auto, {', '.join(DTYPES)}."
            )
        self.store = store
        self.dtype = DTYPES[dtype]
        self.names = tuple(names)
        self.wants_pixels = wants_pixels
        self.statistics = Statistics()
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: deque[tuple[Future, int]] = deque()
        self._told_not_keyable = False

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_thread": None, "_waiting": deque()}

    def look_up(self, path: str, draw: Any) -> Slot:
        """Are the features of a file after a draw there? Reads and checks them, so that the model's process need not.

        Raises:
            FileNotFoundError: the file itself is not there.
        """
        try:
            key = entry_key(path, draw)
        except NotKeyable as err:
            return Slot(b"", note=f"features cannot be cached, as the drawn augmentation holds {err}")
        note = ""
        while (place := self.store.find(key)) is not None:
            blob = self.store.read(place)
            if blob is not None:
                return Slot(key, place, _header(blob)["about"], note)
            self.store.drop(key, place)
            note = (
                f"stored features of {path} are damaged ({self.store.folder / place.shard}.bin at byte "
                f"{place.offset}) and are computed again; `python -m d2_frozen.cache verify` looks at all of them"
            )
        return Slot(key, note=note)

    def fetch(self, slot: Slot) -> dict[str, Tensor] | None:
        """Stored maps by name, (rows, C, h, w) on CPU; None if they are not there.

        Their memory is mapped: what is written into them is seen by later calls in this process, and by no other.
        """
        self._tell(slot)
        if not slot.key:
            self.statistics.not_keyable += 1
            return None
        view = self.store.map(slot.place) if slot.place is not None else None
        if view is None:
            self.statistics.misses += 1
            return None
        self.statistics.hits += 1
        return _unpacked(view)

    def put(self, slot: Slot, maps: Mapping[str, Tensor]) -> None:
        """Store maps (rows, C, h, w) of ``dtype``, unless they are there or there is no room.

        Returns at once; a full disk ends the storing, with one warning, not the run.
        """
        if not slot.key or self.statistics.full or slot.key in self.store:
            return
        # Off the device now: the tensors may be written to after this call.
        parts = _packed({name: maps[name].detach() for name in maps}, slot.about or {})
        size = sum(len(part) for part in parts)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feature-cache")
        while self._waiting and (
            self._waiting[0][0].done() or sum(count for _, count in self._waiting) + size > _WAITING_BYTES
        ):
            self._waiting.popleft()[0].result()
        self._waiting.append((self._thread.submit(self._write, slot.key, parts, size), size))

    def flush(self) -> None:
        """Wait until everything is written; others can find it then."""
        while self._waiting:
            self._waiting.popleft()[0].result()

    def close(self) -> None:
        """Wait until everything is written, and on the disk."""
        self.flush()
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        self.store.close_shard()

    def _write(self, key: bytes, parts: list[memoryview | bytes], size: int) -> None:
        if self.statistics.full or key in self.store:
            return
        try:
            self.store.append(key, parts)
        except CacheFull as err:
            self.statistics.full = str(err)
            logger.warning(
                "The feature cache takes nothing more: %s. What is in it is used; all else is computed.", err
            )
        except OSError as err:
            self.statistics.full = f"{type(err).__name__}: {err}"
            logger.warning("The feature cache cannot be written to, and is only read from now on: %s", err)
        else:
            self.statistics.written += 1
            self.statistics.written_bytes += size

    def _tell(self, slot: Slot) -> None:
        if not slot.note:
            return
        if slot.key:
            self.statistics.damaged += 1
            logger.warning("%s", slot.note)
        elif not self._told_not_keyable:
            self._told_not_keyable = True
            logger.warning("%s; such samples are computed each time.", slot.note)


def _packed(maps: Mapping[str, Tensor], about: Mapping[str, Any]) -> list[memoryview | bytes]:
    """Header and maps as they go into a blob; every map begins at a multiple of 64 bytes."""
    facts: list[dict[str, Any]] = []
    parts: list[memoryview | bytes] = []
    at = 0
    for name, tensor in maps.items():
        plain = tensor.contiguous().cpu()
        # A copy on CPU too, if the tensor was one already: it is written later.
        plain = plain.clone() if plain.data_ptr() == tensor.data_ptr() else plain
        data = memoryview(plain.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        facts.append(
            {"name": name, "dtype": _NAME_OF[tensor.dtype], "shape": list(plain.shape), "offset": at}
        )
        filling = bytes(-len(data) % _ALIGN)
        parts += [data, filling]
        at += len(data) + len(filling)
    header = json.dumps({"maps": facts, "about": dict(about)}).encode()
    header += b" " * (-(len(header) + _HEADER.size) % _ALIGN)
    return [_HEADER.pack(len(header)) + header, *parts]


def _header(blob: bytes | memoryview) -> dict[str, Any]:
    (length,) = _HEADER.unpack(blob[: _HEADER.size])
    return json.loads(bytes(blob[_HEADER.size : _HEADER.size + length]))


def _unpacked(blob: memoryview) -> dict[str, Tensor]:
    (length,) = _HEADER.unpack(blob[: _HEADER.size])
    start = _HEADER.size + length
    maps = {}
    for fact in _header(blob)["maps"]:
        shape = fact["shape"]
        count = shape[0] * shape[1] * shape[2] * shape[3]
        flat = torch.frombuffer(blob, dtype=DTYPES[fact["dtype"]], count=count, offset=start + fact["offset"])
        maps[fact["name"]] = flat.view(shape)
    return maps
