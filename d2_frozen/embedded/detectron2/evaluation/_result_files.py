"""Files of results: whole or not at all, and no reason to lose the metrics."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import IO, Any

from detectron2.checkpoint.atomic import write_atomically
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)


def write_results(path: str, write: Callable[[IO[bytes]], Any], *, needed: bool = False) -> None:
    """Let ``write(stream)`` fill a file, which takes the place of an older one when it is whole.

    Args:
        path: local, or what PathManager knows.
        needed: there are no metrics that would follow; otherwise a file that cannot be written is told only.
    Raises:
        OSError: it cannot be written, and is needed.
    """
    try:
        PathManager.mkdirs(os.path.dirname(path))
        if "://" in path:
            with PathManager.open(path, "wb") as stream:
                write(stream)
        else:
            write_atomically(path, write)
    except OSError as err:
        if needed:
            raise
        logger.error("Results are not in %s: %s. Metrics follow all the same.", path, err)
