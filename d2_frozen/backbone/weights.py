"""Backbone weights: from a file into a network, and from a network into a file.

In: a path, a URL, or ``d2_frozen://FILE`` for a file that ships with the package; .safetensors or .pth.
Out: a network that holds every tensor of it, or an error that says which did not fit.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from iopath.common.file_io import PathHandler
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from detectron2.utils.file_io import PathManager

SHIPPED_DIR = Path(__file__).resolve().parent / "pretrained"
SHIPPED_PREFIX = "d2_frozen://"
# Names in front of the tensors in files that hold more than the weights, or a wrapped network.
_WRAPPERS = ("model", "state_dict", "model_ema")
_SHOWN = 6


class ShippedFileHandler(PathHandler):
    """``d2_frozen://FILE``: files in ``d2_frozen/backbone/pretrained``."""

    def _get_supported_prefixes(self) -> list[str]:
        return [SHIPPED_PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        file = SHIPPED_DIR / path[len(SHIPPED_PREFIX) :]
        if not file.is_file():
            present = ", ".join(sorted(f.name for f in SHIPPED_DIR.glob("*.safetensors"))) or "none"
            raise FileNotFoundError(f"{path}: no such file ships with d2_frozen; there are: {present}.")
        return str(file)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            raise OSError(f"{path} is read-only; it ships with d2_frozen.")
        return open(self._get_local_path(path), mode, buffering=buffering, **kwargs)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return (SHIPPED_DIR / path[len(SHIPPED_PREFIX) :]).exists()

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return (SHIPPED_DIR / path[len(SHIPPED_PREFIX) :]).is_file()


PathManager.register_handler(ShippedFileHandler(), allow_override=True)


def read_weights(path: str) -> dict[str, Tensor]:
    """All tensors of a weight file, on the CPU, floating-point ones as float32.

    Args:
        path: local path, URL or ``d2_frozen://FILE``; .safetensors, .pth, .pt or .bin. A checkpoint that
            keeps its weights under "model", "state_dict" or "model_ema" is unwrapped.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of another format, or holds no tensors.
    """
    try:
        local = PathManager.get_local_path(path)
    except OSError as err:
        raise FileNotFoundError(f"no backbone weights at {path} (MODEL.TIMM.PRETRAINED): {err}") from err
    if not os.path.isfile(local):
        raise FileNotFoundError(
            f"no backbone weights at {path}; correct MODEL.TIMM.PRETRAINED, or set it to '' (random)."
        )
    if local.endswith(".safetensors"):
        try:
            content: Any = load_file(local)
        except SafetensorError as err:
            raise ValueError(
                f"{path} is no complete safetensors file: {err}. Download or copy it again."
            ) from err
    else:
        try:
            content = torch.load(local, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as err:
            raise ValueError(
                f"{path} cannot be read as tensors alone (torch.load with weights_only): {err}. "
                "Save its state_dict as .safetensors, or download it again if it is damaged."
            ) from err
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no tensors by name; expected a state_dict.")
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }


def load_weights(
    network: nn.Module, tensors: Mapping[str, Tensor], source: str, ignore: tuple[str, ...] = ()
) -> None:
    """Copy tensors into a network; all of it must be covered, and nothing may be left over.

    Args:
        tensors: by the network's own names; a common prefix ("module.", "backbone.bottom_up." ...) is taken
            off where the names fit only without it.
        source: named in errors.
        ignore: prefixes of names that may be missing or left over, e.g. the classifier.
    Raises:
        ValueError: names or shapes do not fit; lists them.
    """
    wanted = network.state_dict()
    found = _without_prefix(tensors, wanted)
    persistent = {name for name in wanted if not name.startswith(ignore)} if ignore else set(wanted)
    # Tensors that the network computes for itself (masks, position tables); old files still hold them.
    computed = {name for name, _ in network.named_buffers()} - set(wanted)
    missing = sorted(persistent - set(found))
    unexpected = sorted(
        name for name in set(found) - set(wanted) - computed if not (ignore and name.startswith(ignore))
    )
    misfits = sorted(
        f"{name} is {tuple(found[name].shape)} in the file, {tuple(wanted[name].shape)} in the network"
        for name in persistent & set(found)
        if found[name].shape != wanted[name].shape
    )
    problems = [
        f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (misfits, "of another shape"))
        if names
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit {type(network).__name__} with {len(persistent)} tensors. "
            + "; ".join(problems)
            + ". "
            "Check that MODEL.TIMM.NAME is the network that the file was saved from."
        )
    network.load_state_dict({name: found[name] for name in persistent}, strict=False)


def save_weights(
    tensors: Mapping[str, Tensor],
    path: str | Path,
    *,
    half: bool = False,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write a .safetensors file in one step: the old file stays until the new one is complete.

    Args:
        half: store floating-point tensors as float16.
    """
    path = Path(path)
    content = {
        name: (value.half() if half and value.is_floating_point() else value).contiguous()
        for name, value in tensors.items()
    }
    unfinished = path.with_name(path.name + ".tmp")
    save_file(content, str(unfinished), metadata=metadata)
    os.replace(unfinished, path)


def _without_prefix(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if set(tensors) & set(wanted):
        return dict(tensors)
    first = next(iter(wanted))
    for name in tensors:
        if name.endswith(f".{first}"):
            prefix = name[: -len(first)]
            return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
    return dict(tensors)
