"""The comparison runs, and refuses implementations that disagree; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from d2_frozen.bench import main
from seg_app.benchmarks import deformable
from seg_app.models.deformable import IMPLEMENTATIONS

SMALL = ["--sizes", "64", "--batches", "1", "--rounds", "1", "--warmup", "0", "--device", "cpu"]


def test_cpu_against_exact(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    result = main(["deformable", *SMALL, "--dtypes", "fp32", "--json", str(tmp_path / "found.json")])
    (case,) = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert case == result["cases"][0]
    assert list(case["seconds"]) == ["bags", "grid_sample", "bags / grid_sample"]
    assert set(case["differences"]) == {"result", "to values", "to locations", "to weights"}
    assert max(case["differences"].values()) < 1e-5
    assert "64 px, batch 1, fp32" in capsys.readouterr().out


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = IMPLEMENTATIONS["bags"]
    monkeypatch.setitem(IMPLEMENTATIONS, "bags", lambda *inputs: 1.01 * right(*inputs))
    with pytest.raises(RuntimeError, match=r"bags differs from grid_sample by 0.01 .*cannot be compared"):
        deformable.main([*SMALL, "--dtypes", "fp32"])


def test_nothing_to_compare_is_said() -> None:
    with pytest.raises(RuntimeError, match="on cpu in bf16 the exact implementation runs"):
        deformable.main([*SMALL, "--dtypes", "bf16"])
    assert torch.is_grad_enabled()
