"""From a config to lists of videos that are registered and counted: what happens before a model is built."""

from __future__ import annotations

import logging
import os
from collections import Counter
from typing import Any

from d2_frozen.config import add_frozen_config
from d2_frozen.data import register_from_config
from d2_frozen.data.checks import difference
from d2_frozen.data.prepare import on_first_process
from d2_frozen.data.problems import BadDataError, Problem
from d2_frozen.data.subset import check_subset
from d2_frozen.tasks import leaves
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from video_app.data.lists import only_numbered

logger = logging.getLogger("d2_frozen.video_app.data")

# Looking for all of Kinetics takes minutes on a network disk.
_LOOKED_FOR_BY_DEFAULT = 5000


def prepare_datasets(cfg: CfgNode, train: bool = True) -> None:
    """Register DATASETS.REGISTER, read every used list, look for its files, and fill in the class count.

    A file that is missing or broken does not stop a run unless VIDEO.STRICT says so: training draws another video,
    testing counts it as wrong, OUTPUT_DIR/bad_clips.txt names it. ``python -m video_app.prepare list`` decodes all.

    Args:
        cfg: gets MODEL.VIDEO_HEAD.NUM_CLASSES where that is -1.
        train: False for evaluation only: DATASETS.TRAIN is not looked at, but for the number of classes where those of
            DATASETS.TEST have numbers only.
    Raises:
        BadDataError: datasets that differ in their classes, or with VIDEO.STRICT a missing file.
        ValueError, FileNotFoundError: wrong entries or lists, another class count than the config's, settings that are
            for images only.
    """
    names = list(dict.fromkeys([*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]))
    if train:
        check_subset(cfg)
        _refuse_settings_of_images(cfg)
    if cfg.TEST.AUG.ENABLED:
        raise ValueError(
            "TEST.AUG.ENABLED is for images. Videos are tested on several views: VIDEO.TEST.CLIPS and CROPS."
        )
    if cfg.MODEL.VIDEO_HEAD.SWEEP.SAVE not in ("best", "all"):
        raise ValueError(
            f"MODEL.VIDEO_HEAD.SWEEP.SAVE is {cfg.MODEL.VIDEO_HEAD.SWEEP.SAVE!r}; choose best or all."
        )
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        raise ValueError(
            "DATALOADER.ASPECT_RATIO_GROUPING is True, but sizes of videos are not known before they are read; set it "
            "to False."
        )
    register_from_config(cfg, used=names)
    records = {name: DatasetCatalog.get(name) for name in names}  # this sets the classes, too
    classes = {name: MetadataCatalog.get(name).get("classes", None) for name in names}
    if not train and cfg.MODEL.VIDEO_HEAD.NUM_CLASSES < 0:
        classes |= _classes_of_training(cfg, classes)
    problems = _differences(classes)
    error, missing = on_first_process(lambda: _missing_files(cfg, records))
    if error is not None:
        raise error
    problems += _report_missing(cfg, records, missing)
    if problems:
        raise BadDataError(problems)
    if train:
        _tell_absent_classes(cfg, records, classes)
    _resolve_classes(cfg, classes, train)


def _refuse_settings_of_images(cfg: CfgNode) -> None:
    own = dict(leaves(add_frozen_config(get_cfg()).INPUT))
    changed = [key for key, value in leaves(cfg.INPUT) if key != "FORMAT" and value != own.get(key, value)]
    if changed:
        raise ValueError(
            f"{', '.join(f'INPUT.{key}' for key in changed)}: of INPUT, video has FORMAT only; the rest is for images. "
            "Sizes, crops and mirroring of clips are VIDEO.SHORT_SIDE, CROP_SIZE, TRAIN_CROP and FLIP."
        )


def _differences(classes: dict[str, list[str] | None]) -> list[Problem]:
    """In what the datasets differ: the model has one list of classes."""
    first = _classes_of_all(classes)
    if first is None:
        return []
    problems = []
    for name, known in classes.items():
        if known is None or known == first[1] or (only_numbered(known) and len(known) <= len(first[1])):
            continue
        seen = difference(first[1], known, first[0], name)
        if set(known) < set(first[1]):
            seen += f"; to use it, give its entry all of them: classes: [{', '.join(first[1][:20])}"
            seen += ", ...]" if len(first[1]) > 20 else "]"
        problems.append(Problem("datasets differ in their classes", name, seen, skippable=False))
    return problems


def _classes_of_all(classes: dict[str, list[str] | None]) -> tuple[str, list[str]] | None:
    """(dataset, its classes): the first that names them, else the one with the highest label."""
    given = [(name, list(known)) for name, known in classes.items() if known]
    named = [one for one in given if not only_numbered(one[1])]
    return named[0] if named else max(given, key=lambda one: len(one[1]), default=None)


def _classes_of_training(cfg: CfgNode, classes: dict[str, list[str] | None]) -> dict[str, list[str] | None]:
    """Of the lists of DATASETS.TRAIN that are there, where test lists do not name their classes."""
    if not all(known and only_numbered(known) for known in classes.values()):
        return {}
    found: dict[str, list[str] | None] = {}
    for name in cfg.DATASETS.TRAIN:
        try:
            DatasetCatalog.get(name)
        except (OSError, KeyError, ValueError):
            continue  # an evaluation can do without it
        found[name] = MetadataCatalog.get(name).get("classes", None)
    return found


def _missing_files(cfg: CfgNode, records: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """Name -> files that are not there; sets that are too large to be looked through are left out."""
    wanted = cfg.DATASETS.CHECK_IMAGES
    if wanted == "off":
        return {}
    return {
        name: [record["file_name"] for record in listed if not os.path.exists(record["file_name"])]
        for name, listed in records.items()
        if wanted != "auto" or len(listed) <= _LOOKED_FOR_BY_DEFAULT
    }


def _report_missing(
    cfg: CfgNode, records: dict[str, list[dict[str, Any]]], missing: dict[str, list[str]]
) -> list[Problem]:
    problems = []
    for name, files in missing.items():
        if files and cfg.VIDEO.STRICT:
            problems += [
                Problem("missing file (VIDEO.STRICT)", file, name, skippable=False) for file in files
            ]
        elif files:
            logger.warning(
                "%s: %d of %d videos are not there, the first is %s. Training draws others; in testing they are wrong.",
                name, len(files), len(records[name]), files[0],
            )  # fmt: skip
    return problems


def _tell_absent_classes(
    cfg: CfgNode, records: dict[str, list[dict[str, Any]]], classes: dict[str, list[str] | None]
) -> None:
    for name in cfg.DATASETS.TRAIN:
        counts = Counter(record["label"] for record in records[name])
        known = classes[name] or []
        absent = [label for index, label in enumerate(known) if not counts[index]]
        if absent:
            logger.warning(
                "%s: %d of %d classes have no video: %s.",
                name, len(absent), len(known), ", ".join(absent[:20]) + ", ..." * (len(absent) > 20),
            )  # fmt: skip


def _resolve_classes(cfg: CfgNode, classes: dict[str, list[str] | None], train: bool) -> None:
    head = cfg.MODEL.VIDEO_HEAD
    found = _classes_of_all(classes)
    if found is None:
        if head.NUM_CLASSES < 0:
            raise ValueError(
                "MODEL.VIDEO_HEAD.NUM_CLASSES is -1 (take it from the data), but no dataset of DATASETS.TRAIN and TEST "
                f"({', '.join(classes) or 'both are empty'}) names its classes. Set the number."
            )
        return
    name, known = found
    if head.NUM_CLASSES < 0:
        head.NUM_CLASSES = len(known)
    elif len(known) != head.NUM_CLASSES and not (
        not train and only_numbered(known) and len(known) < head.NUM_CLASSES
    ):
        shown = ", ".join(known[:12]) + ", ..." * (len(known) > 12)
        raise ValueError(
            f"MODEL.VIDEO_HEAD.NUM_CLASSES is {head.NUM_CLASSES}, but dataset {name} has {len(known)} classes "
            f"({shown}). Set it to -1 to take the number from the data."
        )
