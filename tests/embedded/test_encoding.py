"""Text is UTF-8 whatever the locale says: containers without one, Latin-1 clusters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_READS = """
import sys
from pathlib import Path
from d2_frozen import tasks
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation._coco_truth import read_truth
from detectron2.utils.logger import setup_logger
from detectron2.data import MetadataCatalog

assert sys.getfilesystemencoding() == "ascii", sys.getfilesystemencoding()
folder = Path(sys.argv[1])
cfg = tasks.read_config(folder / "a.yaml")
load_coco_json(str(folder / "a.json"), str(folder), "a")
names = MetadataCatalog.get("a").thing_classes
assert cfg.SEED == 1 and names == ["gr\\xf6\\xdfe"], names
assert read_truth(str(folder / "a.json")).cats[1]["name"] == names[0]
setup_logger(str(folder / "out"), name="d2_frozen").info("class %s, file %s", names[0], "\\udcff.jpg")
"""


def test_a_locale_without_utf8_reads_and_logs_what_others_do(tmp_path: Path) -> None:
    """In ASCII, configs with an umlaut in a comment were refused, and lines of the log were lost."""
    (tmp_path / "a.yaml").write_text("# größe\nSEED: 1\n", encoding="utf-8")
    document = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 8, "height": 8}],
        "categories": [{"id": 1, "name": "größe"}],
        "annotations": [],
    }
    (tmp_path / "a.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _READS, str(tmp_path)],
        env={**os.environ, **ascii_only},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "class gr\\xf6\\xdfe, file \\udcff.jpg" in done.stdout and "Logging error" not in done.stderr
    logged = (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    assert logged.endswith("class größe, file \\udcff.jpg\n")
