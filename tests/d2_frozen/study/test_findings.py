"""Which findings hold, on made-up results."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from d2_frozen.study.__main__ import main
from d2_frozen.study.contrasts import FAILS, HOLDS, NOISE, NOT_RUN, difference, together
from d2_frozen.study.findings import Finding, claims_of, findings, unlike, write_findings
from d2_frozen.study.jobs import read_json, write_json
from d2_frozen.study.report import write_report
from d2_frozen.study.tables import cells_of

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def runs(root: Path, table: int, task: str, cell: str, *scores: float) -> None:
    """A finished run per score, with seeds 1, 2, ..."""
    kinds = {"detection": ("bbox", "segm"), "segmentation": ("sem_seg",), "video": ("video",)}[task]
    names = {"bbox": "AP", "segm": "AP", "sem_seg": "mIoU", "video": "top1"}
    for seed, score in enumerate(scores, 1):
        write_json(
            root / f"table{table}" / task / cell / f"seed{seed}" / "result.json",
            {"metrics": {kind: {names[kind]: score} for kind in kinds}, "seed": seed},
        )


def verdict(root: Path, number: str, scale: str = "mini") -> Finding:
    return next(finding for finding in findings(root, scale) if finding.number == number)


def by_seed(*scores: float) -> dict[int, float]:
    return dict(enumerate(scores, 1))


def test_a_difference_of_two_models_is_that_of_the_paired_t_test() -> None:
    """9, 12, 15 apart in the three seeds: mean 12, error 3 / sqrt(3)."""
    from scipy.stats import ttest_rel

    a, b = [10, 14, 18], [1, 2, 3]
    d = difference({"a": 1, "b": -1}, {"a": by_seed(*a), "b": by_seed(*b)})
    assert d.mean == 12 and d.error == pytest.approx(math.sqrt(3)) and d.seeds == 3
    expected = ttest_rel(a, b).confidence_interval(0.95)
    assert (d.low, d.high) == pytest.approx((expected.low, expected.high))
    assert d.verdict == HOLDS


def test_what_a_seed_does_to_all_models_is_no_noise() -> None:
    """A seed that is worth 20 points to every model: the gaps of both rows are the same in each."""
    worth = (0.0, 20.0, -20.0)
    scores = {name: by_seed(*(start + w for w in worth)) for name, start in zip("abcd", (5, 1, 4, 3))}
    d = difference({"a": 1, "b": -1, "c": -1, "d": 1}, scores)
    assert (d.mean, d.error) == (3, 0) and d.verdict == HOLDS


def test_only_seeds_that_all_models_have_count() -> None:
    scores = {"a": {1: 5.0, 2: 7.0, 3: 90.0}, "b": {2: 1.0, 1: 2.0, 4: 0.0}}
    d = difference({"a": 1, "b": -1}, scores)
    assert (d.mean, d.error) == pytest.approx((4.5, 1.5)) and (d.seeds, d.runs) == (2, (3, 3))
    apart = difference({"a": 1, "b": -1}, {"a": {1: 5.0}, "b": {2: 1.0}})
    assert apart.verdict == NOT_RUN and (apart.seeds, apart.runs) == (0, (1, 1))


def test_verdicts() -> None:
    weights = {"a": 1.0, "b": -1.0}
    sure, unsure, zero = by_seed(10.0, 10.1, 9.9), by_seed(10.0, 30.0, -10.0), by_seed(0.0, 0.1, 0.2)
    assert difference(weights, {"a": sure, "b": zero}).verdict == HOLDS
    assert difference(weights, {"a": zero, "b": sure}).verdict == FAILS
    assert difference(weights, {"a": unsure, "b": zero}).verdict == NOISE
    one = difference(weights, {"a": by_seed(10.0), "b": zero})
    assert one.verdict == NOISE and one.mean == 10 and math.isnan(one.error)  # one seed says nothing
    assert difference(weights, {"a": sure}).verdict == NOT_RUN
    assert difference(weights, {"a": by_seed(1.0, 1.0), "b": by_seed(1.0, 1.0)}).verdict == NOISE
    assert together([HOLDS, NOISE]) == NOISE and together([HOLDS, NOISE, FAILS]) == FAILS
    assert together([HOLDS, HOLDS]) == HOLDS and together([]) == NOT_RUN


@pytest.mark.parametrize("scale", ["mini", "full"])
def test_every_cell_of_a_claim_has_a_config(scale: str) -> None:
    for claim in claims_of(scale):
        known = {(cell.task, cell.name) for cell in cells_of(claim.table, scale, CONFIGS)}
        for differences in claim.measures.values():
            for weights in differences.values():
                assert sum(weights.values()) == 0  # the same for every model: no difference
                for task in claim.tasks:
                    assert {(task, cell) for cell in weights} <= known


def test_masked_pretraining_is_worst_for_one_task_and_not_for_another(tmp_path: Path) -> None:
    for task, masked in (("segmentation", 40.0), ("video", 60.0)):
        runs(tmp_path, 1, task, "masked_frozen", masked, masked + 0.2)
        for other in ("contrastive_frozen", "supervised_frozen"):
            runs(tmp_path, 1, task, other, 50.0, 50.2, 50.4)
    found = verdict(tmp_path, "i")
    assert found.verdicts == {
        "detection box AP": NOT_RUN,
        "detection mask AP": NOT_RUN,
        "segmentation mIoU": HOLDS,
        "video top-1": FAILS,
    }
    assert found.verdict == (
        "not run: detection box AP, detection mask AP; holds: segmentation mIoU; does not hold: video top-1"
    )


def test_the_bifpn_narrows_the_gap_more_than_the_cascade(tmp_path: Path) -> None:
    """Gaps: 6 with the plain model, 5 with a cascade, 3 with a BiFPN."""
    for row, frozen, full in (("fpn_mask", 50, 56), ("fpn_cascade", 55, 60), ("bifpn_mask", 54, 57)):
        runs(tmp_path, 2, "detection", f"{row}_frozen", frozen, frozen + 0.1, frozen - 0.1)
        runs(tmp_path, 2, "detection", f"{row}_full", full, full + 0.1, full - 0.1)
    found = verdict(tmp_path, "ii")
    assert found.verdict == HOLDS
    assert [round(line.difference.mean, 6) for line in found.lines] == [3.0, 2.0] * 2
    # Seeds move all models alike.
    assert found.lines[0].difference.error == pytest.approx(0, abs=1e-9)


def test_runs_with_other_options_are_pointed_out(tmp_path: Path) -> None:
    for cell, options in (
        ("linear_frozen", ["SOLVER.MAX_ITER", "2"]),
        ("global_frozen", ["DATALOADER.NUM_WORKERS", "0"]),
    ):
        runs(tmp_path, 4, "video", cell, 50.0)
        path = tmp_path / "table4/video" / cell / "seed1/result.json"
        write_json(path, {**read_json(path), "options": [*options, "SEED", "1"]})
    assert unlike(tmp_path) == [
        "Careful: runs of table4, video had different options: SOLVER.MAX_ITER 2; none."
    ]
    assert "Careful" in write_findings(tmp_path, "mini").read_text()


def similarity(
    folder: Path,
    name: str,
    values: list[list[float | None]],
    labels: tuple,
    complete: bool = True,
    models: int = 1,
) -> None:
    rows, columns = labels
    panel = {"rows": rows, "columns": columns, "cka": values}
    content = {"panels": [panel], "complete": complete, "models": [{}] * models}
    write_json(folder / "cka" / f"{name}.json", content)


def test_similarities_of_a_cascade_are_those_inside_a_stage(tmp_path: Path) -> None:
    cascade = ["stage 1 input", "stage 2 input"], ["stage 1 fc1", "stage 1 fc2", "stage 2 fc1", "stage 2 fc2"]
    for seed, offset in ((1, 0.0), (2, 0.02)):
        folder = tmp_path / "table2" / "detection" / "bifpn_cascade_frozen" / f"seed{seed}"
        similarity(
            folder, "bifpn", [[0.2 + offset, 0.4], [0.2, None]], (["p2", "p3"], ["layer 1", "layer 2"])
        )
        inside_one, inside_two, across = 0.9, 0.7, 0.0
        values: list[list[float | None]] = [
            [inside_one, inside_one, across, across],
            [across, across, inside_two, inside_two],
        ]
        similarity(folder, "cascade", values, cascade)
    found = verdict(tmp_path, "vii")
    (line,) = found.lines
    # 0.8 - (0.8 + offset) / 3
    assert line.difference.mean == pytest.approx(0.8 - 0.81 / 3) and found.verdict == HOLDS
    similarity(folder, "cascade", values, cascade, complete=False)
    assert verdict(tmp_path, "vii").verdict == NOISE  # one seed is left
    similarity(folder, "cascade", values, cascade, models=2)
    assert verdict(tmp_path, "vii").verdict == NOISE


def test_one_head_is_no_cascade(tmp_path: Path) -> None:
    folder = tmp_path / "table2" / "detection" / "bifpn_mask_frozen" / "seed1"
    similarity(folder, "bifpn", [[0.2]], (["p2"], ["layer 1"]))
    similarity(folder, "cascade", [[0.9, 0.9]], (["input"], ["fc1", "fc2"]))
    runs(tmp_path, 2, "detection", "bifpn_mask_frozen", 50.0)
    runs(tmp_path, 2, "detection", "fpn_mask_frozen", 40.0)
    runs(tmp_path, 4, "video", "linear_frozen", 10.0)
    assert verdict(tmp_path, "vii").lines == []


def test_command_and_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "mini"
    assert main(["findings", "--output", str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    runs(root, 4, "video", "linear_frozen", 10.0, 14.0, 12.0)
    runs(root, 4, "video", "temporal_frozen", 50.0, 54.0 - 2.0, 52.0 + 2.0)  # 40, 38, 42 more
    runs(root, 4, "video", "global_frozen", 51.0, 55.0)
    (root / "table4/video/global_frozen/seed2/result.json").write_text('{"metr')  # a full disk, say
    assert main(["findings", "--output", str(tmp_path)]) == 0
    verdicts, differences = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| iv ")
    ][::2]
    assert "Global attention" in verdicts and "cannot be told from noise" in verdicts
    assert "temporal - linear" in differences and "| holds" in differences
    text = (root / "findings.md").read_text()
    assert "| 40.00 ± 1.15 " in text and "| 1 of 1 / 3 " in text and "| vi " in text and "not run" in text
    about = {"config_file": "a.yaml", "options": [], "iterations": 1, "trainable": 1, "parameters": 2}
    about |= {"seconds_of_last_start": 1.0, "peak_memory_mib": 1.0, "device": "a CPU", "commit": "abc"}
    for path in root.rglob("result.json"):
        if (run := read_json(path)) is not None:
            job = path.parent.relative_to(root).as_posix()
            write_json(path, {**run, **about, "job": job, "torch": "2", "engine": "e"})
    page = write_report(root).read_text()
    assert "40.00 ± 1.15" in page and "Findings at scale mini" in page
