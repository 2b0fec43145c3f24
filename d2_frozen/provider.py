"""Which Detectron2 runs: an installed one, or the embedded engine. The only code that touches ``sys.path``.

The folder of the embedded engine is *appended*, so an installed Detectron2 wins.
``D2_FROZEN_ENGINE`` overrides: "auto" (default), "embedded", "detectron2".
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ENGINE_VARIABLE = "D2_FROZEN_ENGINE"
EMBEDDED_DIR = Path(__file__).resolve().parent / "embedded"
_CHOICES = ("auto", "embedded", "detectron2")


def provide_detectron2() -> str:
    """Make ``import detectron2`` work and say which engine it is.

    Returns:
        "detectron2" (installed) or "embedded".
    Raises:
        ValueError: ``D2_FROZEN_ENGINE`` is none of auto, embedded, detectron2.
        ImportError: an engine was asked for that is not there, another one is already imported, or an installed
            Detectron2 fails to import (its own error is the cause).
    """
    wanted = os.environ.get(ENGINE_VARIABLE, "auto").strip().lower() or "auto"
    if wanted not in _CHOICES:
        raise ValueError(f"{ENGINE_VARIABLE}={wanted!r}: choose one of {', '.join(_CHOICES)}.")

    loaded = sys.modules.get("detectron2")
    if loaded is not None:
        engine = _engine_of(loaded)
        if wanted not in ("auto", engine):
            raise ImportError(
                f"{ENGINE_VARIABLE}={wanted}, but {engine} Detectron2 was imported before d2_frozen. "
                "Import d2_frozen first, or unset the variable."
            )
        return engine

    if wanted == "embedded":
        _put_embedded_on_path(first=True)
    elif _installed():
        return _import_installed()
    elif wanted == "detectron2":
        raise ImportError(
            f"{ENGINE_VARIABLE}=detectron2, but no Detectron2 is installed. Install it "
            "(https://detectron2.readthedocs.io/tutorials/install.html) or unset the variable."
        )
    else:
        _put_embedded_on_path(first=False)
    return _engine_of(importlib.import_module("detectron2"))


def engine_name() -> str:
    """The engine in use: "detectron2" or "embedded"."""
    return provide_detectron2()


def embedded_part(name: str) -> ModuleType:
    """A part of the embedded engine that uses nothing of it but the original's API, whichever engine runs.

    Args:
        name: a package below ``detectron2``, e.g. "checkpoint.reading".
    """
    full_name = f"detectron2.{name}"
    if engine_name() == "embedded":
        return importlib.import_module(full_name)
    alias = "d2_frozen_embedded_" + name.replace(".", "_")
    if alias not in sys.modules:
        folder = EMBEDDED_DIR.joinpath(*full_name.split("."))
        spec = importlib.util.spec_from_file_location(
            alias, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[alias] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[alias]
            raise
    return sys.modules[alias]


def _engine_of(module: object) -> str:
    return "embedded" if getattr(module, "EMBEDDED_IN", None) == "d2_frozen" else "detectron2"


def _put_embedded_on_path(first: bool) -> None:
    folder = str(EMBEDDED_DIR)
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder) if first else sys.path.append(folder)


def _installed() -> bool:
    """Is there a Detectron2 that is not ours, editable installs included? A bare folder of that name does not count."""
    ours = str(EMBEDDED_DIR)
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if entry != ours]
    try:
        spec = importlib.util.find_spec("detectron2")
    finally:
        sys.path[:] = before
    return spec is not None and spec.origin is not None


def _import_installed() -> str:
    try:
        module = importlib.import_module("detectron2")
        # The package itself imports nothing; its compiled part is what breaks when torch was changed afterwards.
        importlib.import_module("detectron2.layers")
    except Exception as err:
        for name in [n for n in sys.modules if n == "detectron2" or n.startswith("detectron2.")]:
            del sys.modules[name]
        raise ImportError(
            f"the installed Detectron2 does not import: {type(err).__name__}: {err}. Rebuild it for this torch, "
            f"uninstall it, or set {ENGINE_VARIABLE}=embedded to use the engine that ships with d2_frozen."
        ) from err
    return _engine_of(module)
