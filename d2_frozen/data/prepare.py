"""From a config to data that is registered, checked and counted: what happens before a model is built."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from PIL import Image

from d2_frozen.data.checks import CROWDS_DO_NOT_TRAIN, CocoReport, across, check_coco
from d2_frozen.data.problems import BadDataError, Problem, describe
from d2_frozen.data.register import entry_of, load_coco_instances, register_from_config
from d2_frozen.data.semantic_maps import check_semantic_maps
from d2_frozen.data.subset import check_subset
from d2_frozen.data.written import write_about
from d2_frozen.tasks import Classes
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)

# Where DATASETS.SKIP_BAD put a dataset: name -> (original json, json without the bad records).
_cleaned: dict[str, tuple[str, str]] = {}


def prepare_datasets(cfg: CfgNode, train: bool = True) -> None:
    """Register DATASETS.REGISTER, check every used dataset, and fill in what the data says.

    With several processes, the first one checks and tells the others. Whole datasets are checked and counted,
    whatever share of them DATASETS.SUBSET trains on.

    Args:
        cfg: gets MODEL.ROI_HEADS.NUM_CLASSES where that is -1, and INPUT.MASK_FORMAT "bitmask" where masks to train
            on are RLE: as polygons they cannot be read.
        train: False for evaluation only: DATASETS.TRAIN is not looked at.
    Raises:
        BadDataError: a list of the problems, unless DATASETS.SKIP_BAD is True and all of them can be skipped.
        ValueError, FileNotFoundError: see ``register_from_config``, ``resolve_num_classes``, ``check_subset``;
            MODEL.LOAD_PROPOSALS is set.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS is True: Fast R-CNN on boxes from a file (DATASETS.PROPOSAL_FILES_*) is not "
            "supported here. Use an RPN, e.g. configs/zoo/faster_rcnn_R_50_FPN_1x.yaml, or Detectron2's own tools."
        )
    _check_input(cfg)
    names = list(dict.fromkeys([*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]))
    if train:
        check_subset(cfg)
    register_from_config(cfg, used=names)
    for name in names:
        if name in _cleaned:
            _point_to(name, _cleaned.pop(name)[0])
    error, found = on_first_process(lambda: _check(cfg, names, train))
    if error is not None:
        raise error
    for name, (original, json_file) in found["moved"].items():
        _point_to(name, json_file)
        _cleaned[name] = original, json_file
    if found["rle"] and cfg.INPUT.MASK_FORMAT == "polygon":
        logger.info(
            "%s; INPUT.MASK_FORMAT is set to 'bitmask', which reads polygons too.",
            ", ".join(f"{name} has {count} masks as RLE" for name, count in found["rle"].items()),
        )
        _set(cfg.INPUT, "MASK_FORMAT", "bitmask")
    resolve_num_classes(cfg, names)


def resolve_num_classes(cfg: CfgNode, names: Sequence[str] | None = None) -> int | None:
    """Take MODEL.ROI_HEADS.NUM_CLASSES from the data where it is -1; else compare it with the data.

    Args:
        names: registered datasets; DATASETS.TRAIN and TEST if None.
    Returns:
        The number; None if no dataset names its classes.
    Raises:
        ValueError: -1 and no dataset that names its classes, or another number than the data's.
    """
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST] if names is None else names
    wanted = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    found = next(((name, classes) for name in names if (classes := class_names(name))), None)
    if found is None:
        if wanted < 0:
            raise ValueError(
                "MODEL.ROI_HEADS.NUM_CLASSES is -1 (take it from the data), but no dataset of DATASETS.TRAIN "
                f"and TEST ({', '.join(names) or 'both are empty'}) names its classes. Set the number."
            )
        return None
    name, classes = found
    if twice := sorted({label for label in classes if classes.count(label) > 1}):
        logger.warning(
            "dataset %s has several categories that are called %s. They train as different classes; of their AP-NAME "
            "in metrics.json only the last one's is left. Give them different names.",
            name,
            ", ".join(twice),
        )
    if wanted < 0:
        _set(cfg.MODEL.ROI_HEADS, "NUM_CLASSES", len(classes))
    elif wanted != len(classes):
        shown = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
        raise ValueError(
            f"MODEL.ROI_HEADS.NUM_CLASSES is {wanted}, but dataset {name} has {len(classes)} classes "
            f"({shown}). Set it to -1 to take the number from the data."
        )
    return len(classes)


def class_names(name: str) -> list[str] | None:
    """Class names of a registered dataset in the order of class ids; None if it does not tell."""
    found = classes_of(name)
    return None if found is None else found.names


def classes_of(name: str) -> Classes | None:
    """Names and the data's own category ids of a registered dataset; None if it does not tell."""
    metadata = MetadataCatalog.get(name)
    known = metadata.get("thing_classes", None)
    if known is not None:
        own_ids = metadata.get("thing_dataset_id_to_contiguous_id", None)
        numbers = range(len(known)) if own_ids is None else sorted(own_ids, key=own_ids.__getitem__)
        return Classes(list(known), [n if isinstance(n, str) else int(n) for n in numbers])
    if metadata.get("evaluator_type", None) != "coco" or metadata.get("json_file", None) is None:
        return None
    with PathManager.open(metadata.json_file, "rb") as file:
        categories = sorted(json.load(file)["categories"], key=lambda category: category["id"])
    return Classes([category["name"] for category in categories], [category["id"] for category in categories])


def _set(node: CfgNode, key: str, value: Any) -> None:
    """Fill in a key of a config that may be frozen."""
    frozen = node.is_frozen()
    node.defrost()
    node[key] = value
    if frozen:
        node.freeze()


def _check_input(cfg: CfgNode) -> None:
    """What would fail in the first sample, as if the image were at fault."""
    if cfg.INPUT.MASK_FORMAT not in ("polygon", "bitmask"):
        raise ValueError(f"INPUT.MASK_FORMAT is {cfg.INPUT.MASK_FORMAT!r}; choose polygon or bitmask.")
    wanted, form = len(cfg.MODEL.PIXEL_MEAN), cfg.INPUT.FORMAT
    try:
        channels = 3 if form in ("BGR", "YUV-BT.601") else Image.getmodebands(form)
    except KeyError as err:
        raise ValueError(f"INPUT.FORMAT is {form!r}; choose RGB, BGR, or another mode of PIL.") from err
    if channels not in (1, wanted):
        raise ValueError(
            f"INPUT.FORMAT {form} has {channels} channels, MODEL.PIXEL_MEAN {wanted} values. Use RGB or BGR."
        )


def _check(cfg: CfgNode, names: Iterable[str], train: bool) -> dict[str, dict[str, Any]]:
    """Look at every COCO dataset.

    Returns:
        "moved": name -> (original json, cleaned json) of those with bad records; "rle": name -> number of masks of
        those to train on.
    """
    if train:
        check_semantic_maps(cfg)
    reports: list[CocoReport] = []
    for name in names:
        if name not in DatasetCatalog.list():
            DatasetCatalog.get(name)  # its error says which names there are
        metadata = MetadataCatalog.get(name)
        if metadata.get("evaluator_type", None) != "coco":
            logger.info("%s is no COCO dataset; its records are not checked.", name)
            continue
        reports.append(
            check_coco(
                name,
                metadata.json_file,
                metadata.image_root,
                masks=bool(cfg.MODEL.MASK_ON),
                training=train and name in cfg.DATASETS.TRAIN,
                check_images=cfg.DATASETS.CHECK_IMAGES,
                classes=(entry_of(name) or {}).get("classes"),
            )
        )
    for report in reports:
        if train and report.name in cfg.DATASETS.TRAIN and 2 * report.crowds > report.annotations:
            logger.warning(
                "%s: %d of %d annotations are %s.",
                report.name,
                report.crowds,
                report.annotations,
                CROWDS_DO_NOT_TRAIN,
            )
    problems: list[Problem] = [problem for report in reports for problem in report.problems]
    problems += across(reports)
    found: dict[str, dict[str, Any]] = {"moved": {}, "rle": {}}
    found["rle"] = {
        r.name: r.rle_masks for r in reports if r.rle_masks and train and r.name in cfg.DATASETS.TRAIN
    }
    if not problems:
        return found
    if not cfg.DATASETS.SKIP_BAD or not all(problem.skippable for problem in problems):
        raise BadDataError(problems)
    found["moved"] = {report.name: _write_cleaned(cfg, report) for report in reports if report.problems}
    return found


def _write_cleaned(cfg: CfgNode, report: CocoReport) -> tuple[str, str]:
    images, annotations = report.left_out()
    path = write_about(cfg, report.name, report.cleaned())
    logger.warning(
        "DATASETS.SKIP_BAD: %s goes on without %d images and %d annotations, as %s.\n%s",
        report.name,
        images,
        annotations,
        path,
        describe(report.problems),
    )
    return report.json_file, path


def _point_to(name: str, json_file: str) -> None:
    """Let the catalogs read ``name`` from another json of the same images, loader and evaluator alike."""
    facts: dict[str, Any] = {**MetadataCatalog.get(name).as_dict(), "json_file": json_file}
    facts.pop("name", None)
    image_root, sem_seg_root = facts["image_root"], facts.get("sem_seg_root")
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    DatasetCatalog.register(name, lambda: load_coco_instances(json_file, image_root, name, sem_seg_root))
    MetadataCatalog.get(name).set(**facts)


def on_first_process(work: Callable[[], dict[str, Any]]) -> tuple[Exception | None, dict[str, Any]]:
    """(error, result) of ``work()``, done by the first process and known to all."""
    outcome: tuple[Exception | None, dict[str, Any]] = (None, {})
    if comm.is_main_process():
        try:
            outcome = (None, work())
        except (ValueError, OSError, KeyError) as err:
            outcome = (err, {})
    return comm.all_gather(outcome)[0]
