"""Datasets that have a name without an entry in a config, laid out as Detectron2 lays out its own: Kinetics-400.

$DETECTRON2_DATASETS/kinetics400/train.txt, val.txt, classes.txt    as python -m video_app.prepare kinetics writes them
$DETECTRON2_DATASETS/kinetics400/videos/                            at any depth; paths in the lists begin there
"""

from __future__ import annotations

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from video_app.data.register import load_video_list

SPLITS = ("train", "val")


def register_builtin(root: str) -> None:
    """``kinetics400_train`` and ``kinetics400_val`` under ``root``; nothing is read before they are used."""
    for split in SPLITS:
        name, folder = f"kinetics400_{split}", os.path.join(root, "kinetics400")
        DatasetCatalog.register(
            name, lambda folder=folder, split=split, name=name: _load(folder, split, name)
        )
        MetadataCatalog.get(name).set(evaluator_type="video")


def _load(folder: str, split: str, name: str) -> list[dict]:
    list_file = os.path.join(folder, f"{split}.txt")
    if not os.path.isfile(list_file):
        raise FileNotFoundError(
            f"{name} is looked for as {list_file}, which is not there. Make it with: python -m video_app.prepare "
            f"kinetics --csv {split}.csv --videos {folder}/videos --output {folder} (docs/video.md); or set "
            "DETECTRON2_DATASETS to the folder in which kinetics400 lies."
        )
    return load_video_list(list_file, os.path.join(folder, "videos"), name=name)


register_builtin(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
