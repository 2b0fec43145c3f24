"""A folder ``configs`` with a table of three cells that train in seconds; one of them cannot."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def configs(tiny_config: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "configs" / "coco" / "table6"
    folder.mkdir(parents=True)
    base = f"_BASE_: {tiny_config}\n"
    neck = "MODEL: {NECK: {NAME: FPN}"
    (folder / "percent_10_frozen.yaml").write_text(f"{base}{neck}}}\nTEST: {{PICTURES: 0}}\n")
    (folder / "percent_10_full.yaml").write_text(
        f"{base}{neck}, BACKBONE: {{FREEZE: none}}}}\nTEST: {{PICTURES: 0}}\n"
    )
    (folder / "percent_100_frozen.yaml").write_text(f"{base}{neck}, ROI_HEADS: {{NUM_CLASSES: 2}}}}\n")
    return tmp_path / "configs"
