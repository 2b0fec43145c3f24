"""Which tensors does a weight file hold, and how are they read one at a time?

In: a path, a URL, ``d2_frozen://FILE``, or the shards of one model.  Out: names and shapes at once, tensors when asked
for, so that a network of billions of parameters is never in memory twice.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2_frozen.provider import embedded_part
from detectron2.utils.file_io import PathManager

_reading = embedded_part("checkpoint.reading")
# Where files keep their tensors beside other things. EsViT and DINO hold two networks; the teacher is the released one.
_WRAPPERS = ("model", "state_dict", "model_ema", "teacher", "student")
# Objects that training scripts store beside the weights. They are read as empty dictionaries.
_HARMLESS = (("argparse", "Namespace"), ("yacs.config", "CfgNode"))
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class WeightFiles:
    """Tensors by name in one file or in shards.

    Args:
        path: .safetensors, .pth, .pt or .bin; or shards: an index (``model.safetensors.index.json``), the folder it is
            in, a pattern (``giant-*.safetensors``), names joined by commas, or a sequence of names.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged, of another format, or holds no tensors; shards share a name or one lacks some.
    """

    def __init__(self, path: str | Sequence[str]) -> None:
        self.source = path if isinstance(path, str) else ", ".join(path)
        paths, promised = _expand(path)
        self.shards = [_open(one) for one in paths]
        #: Under which word the first file keeps its tensors ("model", "teacher" ...), "" if at the top.
        self.wrapper = self.shards[0].wrapper
        self.shapes: dict[str, tuple[int, ...]] = {}
        for shard in self.shards:
            twice = sorted(self.shapes.keys() & shard.shapes.keys())
            if twice:
                raise ValueError(f"{shard.path} holds {_some(twice)}, which a shard before it holds too.")
            self.shapes.update(shard.shapes)
        absent = sorted(promised - self.shapes.keys())
        if absent:
            raise ValueError(f"{self.source} lists {_some(absent)}, but none of its files holds it.")

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors on the CPU, shard by shard, floating-point ones as float32."""
        for shard in self.shards:
            for name, value in shard:
                yield name, value.float() if value.is_floating_point() else value


class _SafetensorsFile:
    wrapper = ""

    def __init__(self, path: str, local: str) -> None:
        self.path, self._local = path, local
        try:
            with safe_open(local, framework="pt") as file:
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as err:
            raise ValueError(
                f"{path} is no complete safetensors file: {err}. Download or copy it again."
            ) from err

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        with safe_open(self._local, framework="pt") as file:
            for name in self.shapes:
                yield name, file.get_tensor(name)


class _TorchFile:
    """A file of ``torch.save``: opened without running anything in it, tensors mapped from the disk."""

    def __init__(self, path: str, local: str) -> None:
        self.path, self._local = path, local
        tensors, self.wrapper = self._read()
        self.shapes = {name: tuple(value.shape) for name, value in tensors.items()}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._read()[0].items()

    def _read(self) -> tuple[dict[str, Tensor], str]:
        try:
            with _harmless_classes():
                content = self._load()
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as err:
            raise ValueError(
                f"{self.path} cannot be read as tensors alone (torch.load with weights_only): {err}. "
                "Save its state_dict as .safetensors, or download it again if it is damaged."
            ) from err
        wrapper = ""
        if isinstance(content, Mapping):
            wrapper = next((w for w in _WRAPPERS if isinstance(content.get(w), Mapping)), "")
        tensors = content[wrapper] if wrapper else content
        if not isinstance(tensors, Mapping) or not any(isinstance(v, Tensor) for v in tensors.values()):
            raise ValueError(f"{self.path} holds no tensors by name; expected a state_dict.")
        return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}, wrapper

    def _load(self) -> Any:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        mapped = zipfile.is_zipfile(self._local)
        return torch.load(self._local, map_location="cpu", weights_only=True, mmap=mapped)


def _open(path: str) -> _SafetensorsFile | _TorchFile:
    try:
        local = _reading.local_copy(path, PathManager)
    except OSError as err:
        raise FileNotFoundError(f"no backbone weights at {path} (MODEL.TIMM.PRETRAINED): {err}") from err
    if not os.path.isfile(local):
        raise FileNotFoundError(
            f"no backbone weights at {path}; correct MODEL.TIMM.PRETRAINED, or set it to '' (random)."
        )
    return (_SafetensorsFile if local.endswith(".safetensors") else _TorchFile)(path, local)


def _expand(path: str | Sequence[str]) -> tuple[list[str], set[str]]:
    """Files of a path, and the names that an index says they hold."""
    parts = path.split(",") if isinstance(path, str) else list(path)
    files: list[str] = []
    promised: set[str] = set()
    for part in (p.strip() for p in parts if p.strip()):
        if os.path.isdir(part):
            part = _index_in(part)
        if part.endswith(".json"):
            of_index, names = _read_index(part)
            files += of_index
            promised |= names
        elif glob.has_magic(part) and "://" not in part:
            found = sorted(glob.glob(part))
            if not found:
                raise FileNotFoundError(f"no file fits the pattern {part} of MODEL.TIMM.PRETRAINED.")
            files += found
        else:
            files.append(part)
    if not files:
        raise FileNotFoundError(f"MODEL.TIMM.PRETRAINED is {path!r}, which names no file.")
    return files, promised


def _index_in(folder: str) -> str:
    for name in (*_INDEX_NAMES, "model.safetensors", "pytorch_model.bin"):
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    raise FileNotFoundError(
        f"the folder {folder} holds no {' or '.join(_INDEX_NAMES)}. Name its files by a pattern such as "
        f"{os.path.join(folder, '*.safetensors')}."
    )


def _read_index(path: str) -> tuple[list[str], set[str]]:
    if not PathManager.isfile(path):
        raise FileNotFoundError(f"no index at {path}; correct MODEL.TIMM.PRETRAINED.")
    try:
        with PathManager.open(path, "rb") as stream:
            weight_map = json.load(stream)["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"{path} is no index of shards: it needs 'weight_map', tensor to file.") from err
    outside = [name for name in names if os.path.basename(name) != name]
    if outside:
        raise ValueError(f"{path} names {_some(outside)}; shards must lie beside their index.")
    folder = path[: len(path) - len(os.path.basename(path))]
    return [folder + name for name in names], set(weight_map)


def _harmless_classes() -> contextlib.AbstractContextManager:
    """Lets weights_only reading pass over what it would refuse though it is no code: settings of the training."""
    stands_for: list[Any] = [type(n, (), {"__module__": m, "__new__": _empty}) for m, n in _HARMLESS]
    return torch.serialization.safe_globals(stands_for)


def _empty(cls: type, *args: Any) -> OrderedDict:
    return OrderedDict()


def _some(names: Sequence[str], shown: int = 6) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
