"""Imports point one way, as docs/architecture.md says."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A room may import rooms before it, not after it.
ORDER = [
    "provider",
    "config",
    "tasks",
    "caching",
    "data",
    "backbone",
    "neck",
    "detection",
    "engine",
    "processes",
    "train_net",
    "visualize_data",
    "prediction",
    "predict",
    "cache",
    "joint",
    "benchmarks",
    "study",
    "bench",
]
APPS = {"seg_app", "video_app"}


def imports_of(path: Path) -> Iterator[str]:
    """Modules imported when the file is imported; imports inside functions do not count."""
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def python_files(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    return [path for path in files if "embedded" not in path.relative_to(ROOT).parts]


@pytest.mark.parametrize("room", ORDER)
def test_rooms_import_only_rooms_before_them(room: str) -> None:
    files = python_files(f"d2_frozen/{room}") or [ROOT / f"d2_frozen/{room}.py"]
    later = {f"d2_frozen.{name}" for name in ORDER[ORDER.index(room) + 1 :]}
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files
        for module in imports_of(path)
        if ".".join(module.split(".")[:2]) in later
    ]
    assert not wrong


def test_the_embedded_engine_knows_nothing_of_this_project() -> None:
    files = sorted((ROOT / "d2_frozen/embedded/detectron2").rglob("*.py"))
    assert files
    assert not [
        str(path) for path in files for module in imports_of(path) if module.split(".")[0] == "d2_frozen"
    ]


@pytest.mark.parametrize(
    "room, others", [("d2_frozen", APPS), *((app, APPS - {app}) for app in sorted(APPS))]
)
def test_apps_use_d2_frozen_and_nothing_uses_apps(room: str, others: set[str]) -> None:
    """`train_net` finds the app of a config by name, and imports no other."""
    assert not [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in python_files(room)
        for module in imports_of(path)
        if module.split(".")[0] in others
    ]


def test_importing_the_package_is_light() -> None:
    """`import d2_frozen` must not pull in timm or the models."""
    heavy = ("timm", "d2_frozen.backbone", "d2_frozen.engine")
    code = f"import sys, d2_frozen; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
