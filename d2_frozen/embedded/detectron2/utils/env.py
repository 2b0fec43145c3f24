"""State of the process: random seeds, the torch version, one-time set-up."""

from __future__ import annotations

import functools
import logging
import os
import random

import numpy as np
import torch

from detectron2._outside import outside_message

__all__ = ["TORCH_VERSION", "seed_all_rng", "setup_environment"]

# (major, minor)
TORCH_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


def seed_all_rng(seed: int | None = None) -> None:
    """Seed the generators of Python, numpy and torch (all devices).

    Args:
        seed: 0 .. 2**32 - 1; None takes one from the operating system and logs it.
    """
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
        logging.getLogger(__name__).info("Using a generated random seed %d", seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # Read by child processes that are started afresh, such as data workers under "spawn".
    os.environ["PYTHONHASHSEED"] = str(seed)


@functools.cache
def setup_environment() -> None:
    """Once per process: keep OpenCV from starting threads in every data worker."""
    custom = os.environ.get("DETECTRON2_ENV_MODULE")
    if custom:
        raise NotImplementedError(outside_message(f"DETECTRON2_ENV_MODULE={custom}"))
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(0)
    if hasattr(cv2, "ocl"):
        cv2.ocl.setUseOpenCL(False)
