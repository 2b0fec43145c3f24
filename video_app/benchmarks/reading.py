"""How fast does each reader make clips of files, and does its process grow? What the loader's workers do, one of them.

The same files at the same places for every reader, in turns; a reader never falls back on another one here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2_frozen.benchmarks.measuring import Clock, Seconds
from video_app.clips.decoder import ClipDecoder
from video_app.clips.mapper import ClipMapper

# Opens after which a process has loaded what it needs, and its memory says something.
_WARM_OPENS = 50


def reading_task(mapper: ClipMapper, records: Sequence[dict[str, Any]], reader: str) -> Callable[[], Seconds]:
    """Reads the records as training does, and says how long one clip takes.

    Args:
        mapper: of training; it is used up by this reader.
        reader: the only one that is tried.
    Raises (when run):
        RuntimeError: the reader cannot read one of the files, so that readers cannot be compared.
    """
    mapper.decoder.readers = [reader]
    mapper.strict = True
    now = Clock()

    def run() -> Seconds:
        # The loader seeds so too: every reader gets the same places and crops.
        np.random.seed(0)
        start = now()
        for record in records:
            mapper(record)
        return {"clip": (now() - start) / len(records)}

    return run


def memory_growth_mib(decoder: ClipDecoder, read: Callable[[int], object], opens: int) -> float:
    """By how much the decoding process grows over ``opens`` files, after 50 that it may need; NaN without /proc.

    Args:
        decoder: its process must not be replaced on the way.
        read: reads file number 0, 1, ... with it.
    """
    assert decoder.reading.recycle_after >= opens + _WARM_OPENS
    decoder.close()
    first = 0.0
    for count in range(opens + _WARM_OPENS):
        if count == _WARM_OPENS:
            first = _resident_mib(decoder.process_id)
        read(count)
    return _resident_mib(decoder.process_id) - first


def _resident_mib(process_id: int | None) -> float:
    status = Path(f"/proc/{process_id}/status")
    if not status.exists():
        return float("nan")  # not Linux
    (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024
