"""Reading the window of a crop: pixels are compared before times are reported; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from d2_frozen.bench import main
from d2_frozen.benchmarks import reading


def test_every_photo_is_read_in_three_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading, "_SIZES_HW", ((48, 64), (96, 64)))
    file = tmp_path / "found.json"
    found = main(["reading", "--size", "32", "--draws", "3", "--json", str(file)])
    assert json.loads(file.read_text()) == found
    assert [row["photo"] for row in found["photos"]] == ["64x48", "64x96"]
    for row in found["photos"]:
        for way in ("window", "fast"):
            assert row[f"{way} / whole"] == pytest.approx(row[f"{way}, ms"] / row["whole, ms"])
        assert 0 <= row["fast: mean difference, of 255"] <= row["largest mean of a draw"] < 10
    assert "window / whole" in capsys.readouterr().out


def test_a_window_with_other_pixels_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reading.channels_first
    monkeypatch.setattr(reading, "channels_first", lambda pixels: right(pixels) ^ np.uint8(1))
    with pytest.raises(RuntimeError, match="64x48, draw 0: pixels differ from those of the whole image"):
        reading.compare((48, 64), 32, 1)
