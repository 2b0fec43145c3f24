"""On a GPU, tensors of the host must not meet tensors of the device, and looking at a value waits for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import DETECTION, ROOT, SEGMENTATION, VIDEO, write_config
from torch.utils import backend_registration

import d2_frozen

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="no GPU, and this torch is too old to pretend one",
)
CASCADE = {
    "MODEL": {"ROI_HEADS": {"NAME": "HTCROIHeads"}, "ROI_BOX_HEAD": {"CLS_AGNOSTIC_BBOX_REG": True}},
}
LOW = {"MODEL": {"FROZEN": {"PRECISION": "bf16"}}}


def run(tmp_path: Path, *parts: Any) -> dict[str, Any]:
    config = write_config(tmp_path / "tiny.yaml", *parts)
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/pretended_gpu.py"), str(config)]
    without_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=without_gpu)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("parts", "most_waits"),
    [
        # Of each decoder layer the costs, and the labels once.
        ((SEGMENTATION,), 3),
        ((VIDEO, LOW), 0),
        ((DETECTION, CASCADE), 110),
    ],
    ids=["segmentation", "video", "detection"],
)
def test_a_training_step_stays_on_the_device(tmp_path: Path, parts: Any, most_waits: int) -> None:
    found = run(tmp_path, *parts)
    assert found["gpu"].keys() == found["cpu"].keys()
    for name, loss in found["cpu"].items():
        assert found["gpu"][name] == pytest.approx(loss, rel=0.02 if LOW in parts else 1e-4), name
    if (
        DETECTION not in parts or d2_frozen.engine_name() == "embedded"
    ):  # Detectron2's detector waits twice as often
        assert sum(found["waits"].values()) <= most_waits, found["waits"]
