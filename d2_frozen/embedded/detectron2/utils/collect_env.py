"""What is this machine, and which versions run on it? For logs and bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch
from tabulate import tabulate

__all__ = ["collect_env_info"]

_PACKAGES = (
    "torchvision",
    "timm",
    "fvcore",
    "iopath",
    "numpy",
    "Pillow",
    "opencv-python-headless",
    "pycocotools",
    "faster-coco-eval",
    "safetensors",
)


def collect_env_info() -> str:
    """A table of versions and devices, one per line."""
    import detectron2

    engine = getattr(detectron2, "EMBEDDED_IN", None)
    rows = [
        ("Python", sys.version.replace("\n", " ")),
        ("platform", platform.platform()),
        ("detectron2", f"{detectron2.__version__}" + (f" (embedded in {engine})" if engine else "")),
        ("torch", f"{torch.__version__} (debug: {torch.version.debug}, CUDA: {torch.version.cuda})"),
        *((package, _version(package)) for package in _PACKAGES),
        ("CPU cores, torch threads", f"{os.cpu_count()}, {torch.get_num_threads()}"),
        *_gpus(),
    ]
    return tabulate(rows)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("GPU", "none")]
    rows = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = facts.total_memory / 2**30
        rows.append((f"GPU {index}", f"{facts.name} ({memory:.0f} GiB, sm_{facts.major}{facts.minor})"))
    return rows


if __name__ == "__main__":
    print(collect_env_info())
