"""The generated world: exact labels, determinism, and a folder that is complete or made again."""

from __future__ import annotations

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from d2_frozen.claims import CLAIM_FILE
from d2_frozen.data import shapes
from d2_frozen.data.shapes_render import CLASSES, render


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes") / "world"
    assert shapes.generate(root, train=4, val=2, seed=5, size=128)
    return root


def test_labels_are_the_visible_pixels(world):
    coco = COCO(str(world / "train.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for index, image_id in enumerate(coco.getImgIds()):
        info = coco.imgs[image_id]
        scene = render(5, "train", index, 128)
        assert cv2.imread(str(world / "train" / info["file_name"])).shape == (
            info["height"],
            info["width"],
            3,
        )
        labels = cv2.imread(str(world / "labels/train" / f"{index:06d}.png"), cv2.IMREAD_UNCHANGED)
        expected = np.zeros_like(labels)
        for i, annotation in enumerate(coco.imgToAnns[image_id]):
            mask = coco.annToMask(annotation).astype(bool)
            assert np.array_equal(mask, scene.instances == i + 1)
            x, y, w, h = annotation["bbox"]
            assert mask[y : y + h, x : x + w].sum() == mask.sum() == annotation["area"]
            expected[mask] = annotation["category_id"]
        assert np.array_equal(labels, expected)


def test_a_picture_depends_on_its_place_only():
    again = [render(1, "val", 3, 96) for _ in range(2)]
    assert np.array_equal(again[0].image, again[1].image) and again[0].classes == again[1].classes
    assert not np.array_equal(again[0].image[:60, :60], render(2, "val", 3, 96).image[:60, :60])
    assert not np.array_equal(again[0].image[:60, :60], render(1, "train", 3, 96).image[:60, :60])


def test_second_call_does_nothing(world):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    assert not shapes.generate(world, train=4, val=2, seed=5, size=128)
    assert before == {path: path.stat().st_mtime_ns for path in world.rglob("*")}


def test_missing_file_or_other_parameters_write_again(tmp_path):
    root = tmp_path / "world"
    shapes.generate(root, train=2, val=1, seed=0, size=64)
    (root / "train" / "000001.jpg").unlink()
    assert shapes.generate(root, train=2, val=1, seed=0, size=64)
    assert (root / "train" / "000001.jpg").exists()
    assert shapes.generate(root, train=1, val=1, seed=0, size=64)
    assert sorted(path.name for path in (root / "train").iterdir()) == ["000000.jpg"]
    assert len(json.loads((root / "train.json").read_text())["images"]) == 1


def test_interrupted_call_is_repeated(tmp_path, monkeypatch):
    root = tmp_path / "world"

    def fail(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "coco_annotations", fail)
        with pytest.raises(KeyboardInterrupt):
            shapes.generate(root, train=1, val=1, seed=0, size=64)
    assert shapes.generate(root, train=1, val=1, seed=0, size=64)


def test_other_peoples_folder_is_left_alone(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="not empty"):
        shapes.generate(tmp_path, train=1, val=0, seed=0, size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_command_line(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "w"), "--train", "1", "--val", "0", "--seed", "3", "--size", "64"]
    shapes.main(arguments)
    shapes.main(arguments)
    first, second = capsys.readouterr().out.splitlines()
    assert "written to" in first and "already complete" in second
    with pytest.raises(SystemExit):
        shapes.main(["--output", str(tmp_path / "x"), "--train", "-1"])
    assert "counts are >= 0" in capsys.readouterr().err


def test_of_two_processes_at_once_one_makes_the_world_and_the_other_waits(tmp_path):
    """They removed each other's unfinished files."""
    command = [sys.executable, "-m", "d2_frozen.data.shapes", "--output", str(tmp_path / "world")]
    command += ["--train", "60", "--val", "0", "--size", "96"]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted("written to" in out for out, _ in said) == [False, True], said
    assert not (tmp_path / "world" / CLAIM_FILE).exists()
