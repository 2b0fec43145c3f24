"""The head gives what the public Mask2Former gave: names, shapes, numbers, draws (golden/README.md)."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"
MAKER = Path(__file__).parents[1] / "contract" / "golden" / "make_golden.py"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden_for_seg_app", MAKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fresh(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what these heads answer."""
    try:
        import seg_app.models.public_names  # noqa: F401
    except ImportError as reason:
        pytest.skip(str(reason))
    folder = tmp_path_factory.mktemp("mask2former")
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    maker.SECTIONS["mask2former"](maker.Store(str(folder)))
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mask2former.json", "mask2former.npz"])
def test_agrees_with_mask2former(name: str, maker: ModuleType, fresh: Path) -> None:
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        differing = maker.compare(str(GOLDEN), str(fresh), [name], rtol=1e-3, atol=2e-5)
    assert not differing, report.getvalue()
