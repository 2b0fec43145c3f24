"""One page of everything that has run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from d2_frozen.study.__main__ import main

RESULT = {
    "job": "table5/detection/a_frozen/seed1",
    "config_file": "configs/a.yaml",
    "options": ["SEED", "1"],
    "metrics": {},
    "seed": 1,
    "iterations": 6,
    "trainable": 1_234_567,
    "parameters": 2_000_000,
    "seconds_of_last_start": 75.0,
    "peak_memory_mib": 900.0,
    "device": "a CPU",
    "commit": "abc1234",
    "torch": "2.15",
    "engine": "embedded",
}


def test_report_links_tables_pictures_and_failures(tmp_path: Path) -> None:
    root = tmp_path / "mini"
    run = root / RESULT["job"]  # type: ignore[operator]
    (run / "inference").mkdir(parents=True)
    (run / "result.json").write_text(json.dumps(RESULT))
    (run / "inference" / "predictions_shapes_val.jpg").write_bytes(b"picture")
    (run / "cka").mkdir()
    (run / "cka" / "bifpn.png").write_bytes(b"picture")
    (root / "table5.md").write_text("### Table 5. Larger\n\n| row | box AP |\n|---|---|\n| a | 1.0 ± 0.1 |\n")
    (root / "table5.png").write_bytes(b"picture")
    (root / "broken").mkdir()
    (root / "broken" / "failed.json").write_text(json.dumps({"error": "ValueError: <no>", "traceback": ""}))
    assert main(["report", "--output", str(tmp_path)]) == 0
    text, page = (root / "report.md").read_text(), (root / "report.html").read_text()
    for content in (text, page):
        assert (
            "1.0 ± 0.1" in content
            and "1,234,567" in content
            and "0:01:15" in content
            and "abc1234" in content
        )
        assert "table5.png" in content
        assert "table5/detection/a_frozen/seed1/inference/predictions_shapes_val.jpg" in content
        assert "table5/detection/a_frozen/seed1/cka/bifpn.png" in content
    assert "ValueError: &lt;no&gt;" in page and "<no>" not in page
    assert "| a     | 1.0 ± 0.1 |" in text or "| a | 1.0 ± 0.1 |" in " ".join(text.split())


def test_the_time_of_a_resumed_run_is_said_to_be_that_of_its_last_start(tmp_path: Path) -> None:
    run = tmp_path / "mini" / "a"
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({**RESULT, "resumed": True}))
    assert main(["report", "--output", str(tmp_path)]) == 0
    assert "0:01:15 from the last start" in (tmp_path / "mini/report.html").read_text()


def test_nothing_to_report_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", "--output", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
