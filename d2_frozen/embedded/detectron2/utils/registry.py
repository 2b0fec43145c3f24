"""Names to classes (``Registry``), and dotted names to objects (``locate``)."""

from __future__ import annotations

import builtins
import difflib
import importlib
from typing import Any

from fvcore.common.registry import Registry as _FvcoreRegistry

from detectron2._outside import outside_message

__all__ = ["Registry", "locate"]

# What configs of Detectron2 may name and the embedded engine has not got.
_OUTSIDE = frozenset(
    {
        "FCOS",
        "KRCNNConvDeconvUpsampleHead",
        "PanopticFPN",
        "PrecomputedProposals",
        "ProposalNetwork",
        "RROIHeads",
        "RRPN",
        "Res5ROIHeads",
        "RetinaNet",
        "RotatedAnchorGenerator",
        "SemSegFPNHead",
        "SemanticSegmentor",
        "build_fcos_resnet_fpn_backbone",
        "build_retinanet_resnet_fpn_backbone",
    }
)


class Registry(_FvcoreRegistry):
    """fvcore's registry, whose ``get`` says what there is when a name is missing."""

    def get(self, name: str) -> Any:
        """The object registered as ``name``.

        Raises:
            KeyError: nothing is; the message has a similar name, or says that Detectron2 itself has it.
        """
        if name in self:
            return super().get(name)
        if name in _OUTSIDE:
            raise KeyError(outside_message(f"{name} (registry {self._name})"))
        known = sorted(entry for entry, _ in self)
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known) or 'none'}."
        raise KeyError(
            f"no {name!r} in the registry {self._name}; {hint} A class of your own registers itself when its "
            "module is imported."
        )


def locate(name: str) -> Any:
    """The object behind a dotted name, e.g. ``torch.nn.Linear``; nested classes and methods too.

    Raises:
        ImportError: nothing of that name, or a module on the way does not import (its error is the cause).
    """
    parts = name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ImportError(f"{name!r} is not a dotted Python name.")
    found, rest = _longest_module(name, parts)
    try:
        for part in rest:
            found = getattr(found, part)
    except AttributeError as err:
        raise ImportError(f"cannot locate {name!r}: {err}") from err
    return found


def _longest_module(name: str, parts: list[str]) -> tuple[Any, list[str]]:
    for cut in range(len(parts), 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            return importlib.import_module(module_name), parts[cut:]
        except ModuleNotFoundError as err:
            # Only "this very path is no module" leads on to the next shorter one.
            if err.name is None or not (module_name == err.name or module_name.startswith(err.name + ".")):
                raise ImportError(f"cannot locate {name!r}: {err}") from err
    return builtins, parts


def _convert_target_to_string(target: Any) -> str:
    """Dotted name of a class or function, the shortest that still leads to it: ``torch.optim.SGD``."""
    module, qualname = target.__module__, target.__qualname__
    parts = module.split(".")
    for cut in range(1, len(parts)):
        candidate = ".".join([*parts[:cut], qualname])
        try:
            if locate(candidate) is target:
                return candidate
        except ImportError:
            continue
    return f"{module}.{qualname}"
