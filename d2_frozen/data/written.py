"""Where do files about the data go? ``OUTPUT_DIR/data/NAME.json``, whole or not at all."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from d2_frozen.files import write_text
from detectron2.config import CfgNode


def write_about(cfg: CfgNode, dataset_name: str, document: Any, suffix: str = ".json") -> str:
    """Write ``document`` as JSON for a dataset; characters that a file name should not have become ``_``.

    Returns:
        The absolute path.
    """
    folder = os.path.join(os.path.abspath(cfg.OUTPUT_DIR), "data")
    path = os.path.join(folder, file_name_of(dataset_name) + suffix)
    os.makedirs(folder, exist_ok=True)
    return str(write_text(path, json.dumps(document)))


def file_name_of(dataset_name: str) -> str:
    """The name, with ``_`` for characters that a file name should not have."""
    return re.sub(r"[^\w.-]", "_", dataset_name)
