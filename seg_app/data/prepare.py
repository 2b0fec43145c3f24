"""From a config to label maps that are registered, checked and counted: what happens before a model is built."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from d2_frozen.data import register_from_config
from d2_frozen.data.checks import difference
from d2_frozen.data.prepare import on_first_process
from d2_frozen.data.problems import BadDataError, Problem, describe
from d2_frozen.data.subset import check_subset
from d2_frozen.data.written import write_about
from d2_frozen.tasks import Classes
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from seg_app.data.checks import LabelMapReport, check_label_maps

logger = logging.getLogger("d2_frozen.seg_app.data")


def prepare_datasets(cfg: CfgNode, train: bool = True) -> None:
    """Register DATASETS.REGISTER, check every used dataset, and fill in class count and ignore label.

    With several processes, the first one checks and tells the others.

    Args:
        cfg: gets MODEL.SEM_SEG_HEAD.NUM_CLASSES where that is -1, and then IGNORE_VALUE where 255 is a class.
        train: False for evaluation only: DATASETS.TRAIN is not looked at.
    Raises:
        BadDataError: a list of the problems, unless DATASETS.SKIP_BAD is True and all of them can be skipped.
        ValueError, FileNotFoundError: wrong entries, no class names, or another class count than the config's.
    """
    names = list(dict.fromkeys([*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]))
    if train:
        check_subset(cfg)
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        raise ValueError(
            "DATALOADER.ASPECT_RATIO_GROUPING is True, but sizes of images are not known before they are read; set it "
            "to False."
        )
    register_from_config(cfg, used=names)
    for name in names:
        # What another config left out comes back.
        load = DatasetCatalog[name] if name in DatasetCatalog.list() else None
        if isinstance(load, _Without):
            _replace(name, load.load)
    error, bad = on_first_process(lambda: _check(cfg, names, train))
    if error is not None:
        raise error
    for name, files in bad.items():
        _replace(name, _Without(DatasetCatalog[name], frozenset(files)))
    _resolve_classes(cfg, names)


def classes_of(name: str) -> Classes | None:
    """Names and the values in label maps of a registered dataset's classes; None if it does not name them."""
    facts = MetadataCatalog.get(name)
    names = facts.get("stuff_classes", None)
    if not names:
        return None
    values = facts.get("label_values", None)
    return Classes(list(names), [int(v) for v in (range(len(names)) if values is None else values)])


def _check(cfg: CfgNode, names: Sequence[str], train: bool) -> dict[str, list[str]]:
    """Name -> image files of bad records, for the datasets that have some."""
    reports = [
        check_label_maps(
            name, check_images=cfg.DATASETS.CHECK_IMAGES, training=train and name in cfg.DATASETS.TRAIN
        )
        for name in names
    ]
    problems = [problem for report in reports for problem in report.problems] + _across(reports)
    if problems and not (cfg.DATASETS.SKIP_BAD and all(problem.skippable for problem in problems)):
        raise BadDataError(problems)
    for report in reports:
        _tell_absent_classes(report)
    bad = {}
    for report in reports:
        if report.problems:
            path = write_about(cfg, report.name, report.bad_files, suffix=".left_out.json")
            logger.warning(
                "DATASETS.SKIP_BAD: %s goes on without %d images, listed in %s.\n%s",
                report.name, len(report.bad_files), path, describe(report.problems),
            )  # fmt: skip
            bad[report.name] = report.bad_files
    return bad


def _across(reports: Sequence[LabelMapReport]) -> list[Problem]:
    """In what the datasets differ: the model has one list of classes and one ignore label."""
    named = [report for report in reports if report.classes]
    problems = []
    for other in named[1:]:
        first = named[0]
        if first.classes != other.classes:
            seen = difference(first.classes, other.classes, first.name, other.name)
            problems.append(Problem("datasets differ in their classes", other.name, seen, skippable=False))
    return problems


def _tell_absent_classes(report: LabelMapReport) -> None:
    if report.present is None or not report.classes:
        return
    absent = [label for index, label in enumerate(report.classes) if index not in report.present]
    if absent:
        named = ", ".join(absent[:20]) + ", ..." * (len(absent) > 20)
        if report.ignored_label is not None:
            named += f"; {report.ignored_label} occurs, and is ignored"
        logger.warning(
            "%s: %d of %d classes have no pixel: %s.", report.name, len(absent), len(report.classes), named
        )


@dataclass(frozen=True)
class _Without:
    """A dataset's function that leaves records out (DATASETS.SKIP_BAD)."""

    load: Callable[[], list[dict[str, Any]]]
    files: frozenset[str]

    def __call__(self) -> list[dict[str, Any]]:
        return [record for record in self.load() if record["file_name"] not in self.files]


def _replace(name: str, load: Callable[[], list[dict[str, Any]]]) -> None:
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, load)


def _resolve_classes(cfg: CfgNode, names: Sequence[str]) -> None:
    head = cfg.MODEL.SEM_SEG_HEAD
    known = [(name, MetadataCatalog.get(name)) for name in names]
    named = [(name, facts) for name, facts in known if facts.get("stuff_classes", None)]
    if not named:
        if head.NUM_CLASSES < 0:
            raise ValueError(
                "MODEL.SEM_SEG_HEAD.NUM_CLASSES is -1 (take it from the data), but no dataset of DATASETS.TRAIN and "
                f"TEST ({', '.join(names) or 'both are empty'}) names its classes: give `classes` in its "
                "DATASETS.REGISTER entry, put classes.txt (one name per line) or classes.json beside the label maps, "
                "or set the number."
            )
        return
    name, facts = named[0]
    count = len(facts.stuff_classes)
    if head.NUM_CLASSES < 0:
        head.NUM_CLASSES = count
        if head.IGNORE_VALUE == 255 < count:
            head.IGNORE_VALUE = 65535  # 255 is a class here
    elif count != head.NUM_CLASSES:
        shown = ", ".join(facts.stuff_classes[:12]) + ", ..." * (count > 12)
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {head.NUM_CLASSES}, but dataset {name} has {count} classes ({shown}). "
            "Set it to -1 to take the number from the data."
        )
    if 0 <= head.IGNORE_VALUE < count and head.IGNORE_VALUE != 255:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {head.IGNORE_VALUE}, the number of the class "
            f"{facts.stuff_classes[head.IGNORE_VALUE]}. It is that of ignored pixels in the model: leave it at 255. "
            "The number that is ignored in your files is ignore_label of the DATASETS.REGISTER entry; where classes "
            "there do not begin at 0, list their numbers in label_values, and all others are ignored."
        )
