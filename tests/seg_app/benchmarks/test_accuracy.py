"""``bench accuracy`` of a head for segmentation."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from d2_frozen import bench
from d2_frozen.train_net import main


def test_two_modes(flags: Callable[..., Namespace], tiny_config: Path, tmp_path: Path) -> None:
    main(flags("SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"))
    head = ["MODEL.WEIGHTS", str(tmp_path / "out" / "model_final.pth")]
    result = bench.main(["accuracy", "--config-file", str(tiny_config), "--modes", "fp32", "bf16", *head])
    exact, low = result["modes"].values()
    assert all(0 <= error < 1e-5 for error in exact["error"].values())
    assert all(1e-4 < error < 0.05 for error in low["error"].values())
    again = main(flags("--eval-only", *head))
    assert 0 <= exact["metrics"]["sem_seg/mIoU"] == again["sem_seg"]["mIoU"]
    assert 0 <= low["metrics"]["sem_seg/mIoU"] <= 100
