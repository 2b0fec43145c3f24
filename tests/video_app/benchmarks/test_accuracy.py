"""``bench accuracy`` of a head for video."""

from pathlib import Path

from tiny_runs import Flags, assert_accuracy_of_two_modes


def test_two_modes(flags: Flags, tiny_config: Path, tmp_path: Path) -> None:
    assert_accuracy_of_two_modes(flags, tiny_config, tmp_path / "out", "video", "top1")
