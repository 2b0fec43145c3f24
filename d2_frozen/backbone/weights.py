"""Backbone weights: from a file into a network, and from a network into a file.

In: a path, a URL, ``d2_frozen://FILE`` for a file that ships with the package, or shards; .safetensors or .pth.
Out: a network that holds every tensor of it, or an error that says which did not fit.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from iopath.common.file_io import PathHandler
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from d2_frozen.backbone.importers import ImportReport, fill, finish_meta_network, plan_import
from d2_frozen.backbone.weight_files import WeightFiles
from d2_frozen.files import whole_file
from detectron2.utils.file_io import PathManager

SHIPPED_DIR = Path(__file__).resolve().parent / "pretrained"
SHIPPED_PREFIX = "d2_frozen://"
logger = logging.getLogger(__name__)


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
    """All tensors of a weight file, on the CPU, floating-point ones as float32; see :class:`WeightFiles`."""
    return dict(WeightFiles(path))


def load_weights(
    network: nn.Module,
    weights: WeightFiles | Mapping[str, Tensor],
    source: str = "",
    ignore: tuple[str, ...] = (),
) -> ImportReport:
    """Copy tensors into a network; all of it must be covered, and nothing may be left over.

    Public checkpoints of Swin networks are recognised by their names (:mod:`d2_frozen.backbone.importers`). For other
    networks, names that do not fit go through the conversion that timm has for releases of that network.

    Args:
        network: on the meta device, or with memory; the former gets it tensor by tensor.
        source: named in the report and in errors.
        ignore: prefixes of names that may be missing or left over, e.g. the classifier.
    Raises:
        ValueError: names or shapes do not fit; lists them.
    """
    if isinstance(weights, WeightFiles):
        shapes, wrapper, source = weights.shapes, weights.wrapper, source or weights.source
        tensors: Iterable[tuple[str, Tensor]] = weights
    else:
        shapes, wrapper = {name: tuple(value.shape) for name, value in weights.items()}, ""
        tensors = weights.items()
    targets, report = plan_import(shapes, network, source, ignore, wrapper)
    if not report.fits:
        converted = _converted_by_timm(network, tensors)
        second = {name: tuple(value.shape) for name, value in converted.items()}
        other_targets, other = plan_import(second, network, source, ignore)
        if not other.fits:
            raise ValueError(report.refusal())
        other.format = "converted by timm"
        targets, report, tensors = other_targets, other, converted.items()
    on_meta = any(value.is_meta for value in network.parameters())
    fill(network, tensors, targets)
    if on_meta:
        finish_meta_network(network)
    logger.info(report.summary())
    return report


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
    content = {
        name: (value.half() if half and value.is_floating_point() else value).contiguous()
        for name, value in tensors.items()
    }
    with whole_file(path) as partial:
        save_file(content, str(partial), metadata=metadata)


def _converted_by_timm(network: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """What timm makes of a release of this kind of network; nothing where it has no conversion, or it fails."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if convert is None or isinstance(network, SwinTransformer | SwinTransformerV2):
        return {}
    try:
        converted = convert(dict(tensors), network)
    except (KeyError, IndexError, AttributeError, RuntimeError, TypeError, ValueError, AssertionError):
        return {}  # not a file of this network: the refusal says what does not fit
    return {name: value for name, value in converted.items() if isinstance(value, Tensor)}
