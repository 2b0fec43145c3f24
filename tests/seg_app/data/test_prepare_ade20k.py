"""A miniature of the official release into Detectron2's layout."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seg_app.prepare import ReleaseError, main, prepare_ade20k

COUNTS = {"training": 2, "validation": 1}


def release(root: Path) -> Path:
    folder = root / "ADEChallengeData2016"
    for split, count in COUNTS.items():
        for part in ("images", "annotations"):
            (folder / part / split).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 3)).save(folder / "images" / split / f"ADE_{split}_{i}.jpg")
            numbers = np.uint8([[0, 1, 150, 2]] * 3)
            Image.fromarray(numbers).save(folder / "annotations" / split / f"ADE_{split}_{i}.png")
    return folder


def test_0_is_ignored_and_the_others_move_down(tmp_path: Path) -> None:
    folder = release(tmp_path)
    assert prepare_ade20k(tmp_path, expected=COUNTS) == COUNTS
    with Image.open(folder / "annotations_detectron2/validation/ADE_validation_0.png") as image:
        assert np.array(image).tolist() == [[255, 0, 149, 1]] * 3
    assert prepare_ade20k(tmp_path, expected=COUNTS) == {"training": 0, "validation": 0}


def test_an_interrupted_call_is_completed(tmp_path: Path) -> None:
    folder = release(tmp_path)
    prepare_ade20k(tmp_path, expected=COUNTS)
    (folder / "annotations_detectron2/training/ADE_training_1.png").unlink()
    assert prepare_ade20k(tmp_path, expected=COUNTS) == {"training": 1, "validation": 0}


def test_the_zip_is_unpacked_where_it_belongs(tmp_path: Path) -> None:
    folder = release(tmp_path / "there")
    with zipfile.ZipFile(tmp_path / "ade.zip", "w") as zipped:
        for path in sorted(folder.rglob("*.*")):
            zipped.write(path, path.relative_to(tmp_path / "there"))
        zipped.writestr("ADEChallengeData2016/images/../../outside.jpg", b"no")
    assert prepare_ade20k(tmp_path / "here", tmp_path / "ade.zip", COUNTS) == COUNTS
    assert not list(tmp_path.rglob("outside.jpg"))


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="ADEChallengeData2016.zip"):
        prepare_ade20k(tmp_path, expected=COUNTS)
    folder = release(tmp_path)
    with pytest.raises(SystemExit, match="has 2 label maps of training, the official release 20210"):
        main(["ade20k", "--root", str(tmp_path)])
    Image.new("RGB", (4, 3)).save(folder / "annotations/training/ADE_training_0.png")
    with pytest.raises(ReleaseError, match=r"ADE_training_0.png has shape \(3, 4, 3\)"):
        prepare_ade20k(tmp_path, expected=COUNTS)
    (folder / "images/training/ADE_training_1.jpg").unlink()
    with pytest.raises(ReleaseError, match="lack their image; the first is ADE_training_1"):
        prepare_ade20k(tmp_path, expected=COUNTS)


def test_an_archive_that_is_cut_or_another_one_is_named(tmp_path: Path) -> None:
    """Half a download has no table of contents; a hole in the middle shows in a checksum."""
    release(tmp_path / "made")
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as zipped:
        for path in sorted((tmp_path / "made").rglob("*.*")):
            zipped.write(path, path.relative_to(tmp_path / "made"))
    content = whole.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[: len(content) // 2])
    hole = content.find(b"IDAT")
    (tmp_path / "hole.zip").write_bytes(content[:hole] + bytes(8) + content[hole + 8 :])
    for name in ("cut.zip", "hole.zip"):
        with pytest.raises(ReleaseError, match=rf"{name} is cut, damaged.*Download it again"):
            prepare_ade20k(tmp_path / "root", tmp_path / name, COUNTS)
    assert not list((tmp_path / "root").rglob("*.partial"))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as zipped:
        zipped.writestr("ADE20K_2016_07_26/index.mat", "")
    with pytest.raises(ReleaseError, match="other.zip has no .* but ADE20K_2016_07_26"):
        prepare_ade20k(tmp_path / "root", tmp_path / "other.zip", COUNTS)
    prepare_ade20k(tmp_path / "root", whole, COUNTS)
