"""docs/library.md: its blocks run one after the other, as they stand but for how long and at which size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from d2_frozen import config
from d2_frozen.data.shapes import generate
from d2_frozen.neck import NECK_REGISTRY
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY

ROOT = Path(__file__).resolve().parents[1]
SHORTER = {
    "SCALE_CROP.SIZE = 640": "SCALE_CROP.SIZE = 96",
    "MAX_ITER = 2000": "MAX_ITER = 2",
    "IMS_PER_BATCH = 4": "IMS_PER_BATCH = 2",
    "T.Resize((320, 320))": "T.Resize((96, 96))",
    '"configs/': f'"{ROOT}/configs/',
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty working directory with data; what the page registers is gone behind it."""
    generate(tmp_path / "parts", train=4, val=2, seed=5, size=96)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "_keys_of_others", {})
    yield tmp_path
    for name in ("parts_train", "parts_val"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    NECK_REGISTRY._obj_map.pop("Lateral", None)
    BACKBONE_REGISTRY._obj_map.pop("TorchvisionResNet18", None)


def test_its_blocks_run(folder: Path) -> None:
    text = (ROOT / "docs" / "library.md").read_text()
    for shown, short in SHORTER.items():
        assert shown in text
        text = text.replace(shown, short)
    names: dict[str, Any] = {"__name__": "library_page"}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/library.md", "exec"), names)
    assert set(names["results"]) == {"parts"} and names["drawn"].shape == names["picture"].shape
    assert names["trainer"].iter == 2 and (folder / "output" / "own" / "model_final.pth").exists()
    assert names["model"].frozen_backbone.name == "TorchvisionResNet18"
    assert names["own"].MODEL.LATERAL.WIDTH == 64
    assert [p.grad is None for p in names["network"].parameters()] == [True] * 183
    assert all(p.grad is not None for p in names["head"].parameters())
    assert names["cache"].statistics.written == 2
    similarity = torch.from_numpy(names["cka"].cka())
    assert similarity.shape == (2, 2) and similarity.isfinite().all()
