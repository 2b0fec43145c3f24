"""Where do files about the data go? ``OUTPUT_DIR/data/NAME.json``, whole or not at all."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from detectron2.config import CfgNode


def write_about(cfg: CfgNode, dataset_name: str, document: Any, suffix: str = ".json") -> str:
    """Write ``document`` as JSON for a dataset; characters that a file name should not have become ``_``.

    Returns:
        The absolute path.
    """
    folder = os.path.join(os.path.abspath(cfg.OUTPUT_DIR), "data")
    path = os.path.join(folder, re.sub(r"[^\w.-]", "_", dataset_name) + suffix)
    os.makedirs(folder, exist_ok=True)
    partial = f"{path}.{os.getpid()}.partial"
    with open(partial, "w") as file:
        json.dump(document, file)
    os.replace(partial, path)
    return path
