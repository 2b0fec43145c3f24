"""Which features may be mixed? Those of one space: one backbone, one arithmetic, one preprocessing, one dtype.

A cache folder holds one subfolder per space, named by a hash of the facts in its ``space.json``. Another backbone in
the same folder is another space, and never hits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from d2_frozen.caching.store import Store, bytes_under
from d2_frozen.files import write_text

logger = logging.getLogger(__name__)

_FACTS = "space.json"
# Of the layout of blobs and the meaning of keys; a change makes new spaces.
FORMAT = 1


class Space:
    """
    Args:
        root: the cache folder.
        facts: plain values; everything that reaches the features beside the file and the draw.
    """

    def __init__(self, root: str | Path, facts: dict[str, Any]) -> None:
        self.root = Path(root)
        self.facts = {**facts, "format": FORMAT}
        text = json.dumps(self.facts, sort_keys=True)
        self.id = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = self.root / self.id

    def open(self, max_bytes: int = 0) -> Store:
        """Its store, made if it is not there; notes that it is in use."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _FACTS
        if path.exists():
            with contextlib.suppress(OSError):  # perhaps somebody else's
                os.utime(path)
        else:
            write_text(path, json.dumps(self.facts, indent=1, sort_keys=True) + "\n")
        return Store(self.folder, max_bytes, limit_root=self.root)

    def last_used(self) -> float:
        """Seconds since 1970 of the last time that it was opened."""
        return (self.folder / _FACTS).stat().st_mtime

    def bytes(self) -> int:
        """On disk."""
        return bytes_under(self.folder)

    def describe(self) -> str:
        """The facts in one line."""
        shown = {key: value for key, value in self.facts.items() if key != "format"}
        shown["sha256"] = str(shown.get("sha256", ""))[:12]
        return ", ".join(f"{key} {value}" for key, value in shown.items())


def spaces_in(root: str | Path) -> list[Space]:
    """All spaces of a cache folder, that last used first; other things in the folder are left alone, among them
    folders whose space.json is not what a cache writes.

    Raises:
        FileNotFoundError: no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no cache folder at {root}; MODEL.FROZEN.CACHE.DIR says where it is.")
    found = []
    for path in root.glob(f"*/{_FACTS}"):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:  # pruned meanwhile
            continue
        except ValueError:
            facts = None
        if not isinstance(facts, dict):
            logger.warning("%s is not what a feature cache writes; its folder is left alone.", path)
            continue
        facts.pop("format", None)
        space = Space(root, facts)
        space.folder = path.parent  # of an older format it has another name
        space.id = path.parent.name
        found.append(space)
    return sorted(found, key=lambda space: -space.last_used())
