"""One pass for two heads is counted, equals a pass of each, and ratios follow from the seconds; nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import DETECTION, SEGMENTATION, write_config

from d2_frozen.bench import main
from d2_frozen.benchmarks import one_pass

ROUNDS = ["--size", "64", "--rounds", "2", "--warmup", "1"]


@pytest.fixture
def two_heads(tmp_path: Path) -> list[str]:
    """A detector and a segmentor on one small backbone; the first leaves its class count to the data."""
    classes = {"MODEL": {"SEM_SEG_HEAD": {"NUM_CLASSES": 3}}}
    files = [
        write_config(tmp_path / "detection.yaml", DETECTION),
        write_config(tmp_path / "segmentation.yaml", SEGMENTATION, classes),
    ]
    return [str(file) for file in files]


def test_every_way_is_measured(
    two_heads: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    found = main(["one_pass", "--config-files", *two_heads, *ROUNDS, "--batch", "2", "--json", str(file)])
    assert json.loads(file.read_text()) == found
    assert (found["configs"], found["options"], found["size"], found["batch"]) == (two_heads, [], 64, 2)
    seconds = {way: list(phases) for way, phases in found["seconds"].items()}
    heads = ["detection", "semantic segmentation"]
    assert seconds == {"together": ["all"], "apart": heads, "parts": ["backbone", *heads]}
    together = found["seconds"]["together"]["all"]
    for way in ("apart", "parts"):
        expected = together / sum(found["seconds"][way].values())
        assert found["ratios"][f"together / {way}"] == pytest.approx(expected)
    assert found["images per second, together"] == pytest.approx(2 / together)
    # Each of the three rounds: one pass of both heads, used twice; one of the parts, asked for once more by the
    # second head, and used by both.
    assert found["memory"] == {"passes": 3 * 2, "reused": 3 * (1 + 3)}
    printed = capsys.readouterr().out
    for text in (*heads, "2 x 64 px", f"together / apart: {found['ratios']['together / apart']:.3f}"):
        assert text in printed


def test_both_ways_give_the_same_results_of_real_work(two_heads: list[str]) -> None:
    both, detector, segmentor = one_pass._predictors(two_heads, ["MODEL.FROZEN.PRECISION", "bf16"], 64)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    together, boxes, areas = (predictor([picture])[0] for predictor in (both, detector, segmentor))
    found, alone = (one["detection"]["instances"] for one in (together, boxes))
    assert len(found) == len(alone) > 0, "a detector that finds nothing has no masks to compute"
    for field, value in alone.get_fields().items():
        got = found.get(field)
        assert torch.equal(getattr(got, "tensor", got), getattr(value, "tensor", value)), field
    scores, alone = (one["semantic segmentation"]["sem_seg"] for one in (together, areas))
    assert scores.shape == (3, 64, 64) and torch.equal(scores, alone)
    assert {head.cfg.MODEL.FROZEN.PRECISION for head in both.heads} == {"bf16"}
    assert both.heads[0].cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1


def test_heads_that_are_not_one_of_each_are_refused(two_heads: list[str]) -> None:
    with pytest.raises(
        ValueError, match=r"detection.yaml is for detection and .*detection.yaml is for detection"
    ):
        main(["one_pass", "--config-files", two_heads[0], two_heads[0], *ROUNDS])


def test_heads_on_two_backbones_share_nothing(two_heads: list[str], tmp_path: Path) -> None:
    other = {"_BASE_": two_heads[1], "MODEL": {"TIMM": {"FINAL_NORM": True}}}
    files = [two_heads[0], str(write_config(tmp_path / "other.yaml", other))]
    with pytest.raises(
        ValueError, match=r"do not share the pass:\npass 1: detection on .*\npass 2: semantic"
    ):
        main(["one_pass", "--config-files", *files, *ROUNDS])
