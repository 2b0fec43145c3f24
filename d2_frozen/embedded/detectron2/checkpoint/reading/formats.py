"""From a local file of weights to ``{"model": {name: array or tensor}, ...}``, whatever its format."""

from __future__ import annotations

import logging
import os
import pickle
from typing import Any

import numpy as np
import torch

from .safe_pickle import UnsafePickleError, load_pickle

logger = logging.getLogger(__name__)


def read_weights(path: str) -> dict[str, Any]:
    """Read ``.pkl`` (Detectron, Detectron2), ``.safetensors``, ``.pyth`` (pycls), or else what ``torch.save`` wrote.

    Returns:
        A dict with "model", and what else the file holds. "matching_heuristics": True asks for matching names
        by their ends; "__author__": "Caffe2" for Detectron 1's names.
    Raises:
        ValueError: the file is damaged.
        UnsafePickleError: it holds more than arrays and plain values, and is refused.
        AttributeError: a ``.pkl`` without names.
    """
    extension = os.path.splitext(path)[1].lower()
    if extension == ".pkl":
        return _read_pickle(path)
    if extension == ".safetensors":
        return {"model": _read_safetensors(path)}
    content = _read_torch(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected weights by name.")
    if extension == ".pyth" and "model_state" in content:  # pycls
        return {"model": content["model_state"], "__author__": "pycls", "matching_heuristics": True}
    return content if "model" in content else {"model": content}


def _read_pickle(path: str) -> dict[str, Any]:
    with open(path, "rb") as stream:
        content = load_pickle(stream, path)
    if not isinstance(content, dict):
        # Not a TypeError: Detectron2's callers know this one.
        raise AttributeError(f"{path} holds a {type(content).__name__}, expected weights by name.")
    if "model" in content and "__author__" in content:
        if not isinstance(content["model"], dict):
            raise AttributeError(
                f"{path} holds a {type(content['model']).__name__} as its model, expected weights by name."
            )
        if isinstance(content["__author__"], str):
            logger.info("Reading a file from '%s'", content["__author__"])
        return content
    blobs = content.get("blobs", content)
    weights = {
        name: value
        for name, value in blobs.items()
        if isinstance(value, np.ndarray) and not str(name).endswith("_momentum")
    }
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except SafetensorError as err:
        raise ValueError(_damaged(path, err)) from err


def _read_torch(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        text = str(err)
        with open(path, "rb") as stream:
            start = stream.read(40)
        if start and not start.startswith((b"\x80", b"PK")):  # neither a pickle nor a zip archive
            raise ValueError(f"{path} is no file of weights: it starts with {start!r}.") from err
        if "Unsupported" not in text and "not an allowed" not in text and "GLOBAL" not in text:
            raise ValueError(_damaged(path, err)) from err
        raise UnsafePickleError(
            f"{path} holds Python objects beyond tensors and plain values; not loaded, as they "
            f"could run code: {_first_sentence(text)} If you trust the file, load it elsewhere with torch "
            "and keep its state_dict only."
        ) from err
    except OSError:  # not readable at all, and says so
        raise
    except Exception as err:  # torch raises whatever the bytes lead to
        raise ValueError(_damaged(path, err)) from err


def _damaged(path: str, err: Exception) -> str:
    size = os.path.getsize(path)
    cause = f"{type(err).__name__}: {_first_sentence(str(err))}"
    return (
        f"{path} ({size} bytes) cannot be read as weights ({cause}). "
        "It is damaged, perhaps cut off: compare its size with the original's, and fetch or copy it again."
    )


def _first_sentence(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines or ["no message"])[0][:300]
