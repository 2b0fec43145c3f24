"""COCOEvaluator: box AP, mask AP and proposal AR of a model's outputs, by COCO's protocol.

In: per image ``{"instances": Instances}`` or ``{"proposals": Instances}``.
Out: ``{"bbox": {...}, "segm": {...}, "box_proposals": {...}}`` in percent, and files in ``output_dir``.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import os
import pickle
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch
from faster_coco_eval.core.coco import COCO
from tabulate import tabulate

from detectron2._outside import outside_message, outside_subset
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict, convert_to_coco_json
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table

from . import _coco_metrics as metrics
from ._coco_matching import Curves
from ._coco_truth import index_truth, read_truth, without_missing_masks
from ._mask_coding import encode_masks
from ._result_files import write_results
from .evaluator import DatasetEvaluator

# Evaluators that other projects derive from Detectron2's import the functions with an underscore, too.
__getattr__ = outside_subset(
    __name__, ("COCOevalMaxDets", "_evaluate_box_proposals", "_evaluate_predictions_on_coco")
)

__all__ = ["COCOEvaluator", "instances_to_coco_json"]

_TASKS = ("bbox", "segm")
# Detections per image that AR is reported for, beside the limit of all other metrics.
_AR_LIMITS = (1, 10)
_DEFAULT_LIMIT = 100


class COCOEvaluator(DatasetEvaluator):
    """AP of boxes and masks, AR of proposals, for any dataset in COCO format or in Detectron2's own.

    Class ids of the model (0 .. n-1) are mapped back to the category ids of the json, also when nobody has
    read the dataset before.

    Args:
        dataset_name: a registered dataset. With ``json_file`` in its metadata, that is the ground truth;
            otherwise the registered dicts are converted (and written to ``output_dir`` where one is given).
        tasks: some of "bbox", "segm"; None takes what the predictions have. A config in this place (the
            signature of old releases) means None.
        distributed: gather the predictions of all processes and evaluate on the first.
        output_dir: where to write ``instances_predictions.pth`` (list of dicts, loads with
            ``weights_only=True``) and ``coco_instances_results.json`` (COCO's results format), for proposals
            ``box_proposals.pkl``.
        max_dets_per_image: detections per image and category that count, 100 by default. AR@10 is part of the
            protocol, so fewer than 10 act as 10.
        use_fast_impl: False takes pycocotools, slower and equal.
        kpt_oks_sigmas: keypoints are outside the subset: must be empty.
        allow_cached_coco: reuse a converted json that lies in ``output_dir``.
    Raises:
        ValueError: unknown task, non-positive limit, or a ground truth file that is no COCO json.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | CfgNode | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
        allow_cached_coco: bool = True,
    ) -> None:
        self._logger = logging.getLogger(__name__)
        self._distributed = distributed
        self._output_dir = output_dir
        self._use_fast_impl = use_fast_impl
        self._tasks = self._checked_tasks(tasks)
        self._max_dets = self._checked_limits(max_dets_per_image)
        if len(kpt_oks_sigmas):
            raise NotImplementedError(outside_message("keypoint evaluation (COCOEvaluator's kpt_oks_sigmas)"))
        self._cpu_device = torch.device("cpu")
        self._dataset_name = dataset_name
        self._metadata = MetadataCatalog.get(dataset_name)
        self._coco_api = self._load_truth(allow_cached_coco)
        self._do_evaluation = "annotations" in self._coco_api.dataset
        self._predictions: list[dict[str, Any]] = []
        self._results: OrderedDict[str, dict[str, float]] = OrderedDict()

    def _checked_tasks(self, tasks: Any) -> tuple[str, ...] | None:
        if isinstance(tasks, CfgNode):
            self._logger.warning(
                "COCOEvaluator was given a config as `tasks`: the tasks follow the predictions."
            )
            return None
        if tasks is None:
            return None
        tasks = (tasks,) if isinstance(tasks, str) else tuple(tasks)
        if "keypoints" in tasks:
            raise NotImplementedError(
                outside_message("keypoint evaluation (COCOEvaluator's task 'keypoints')")
            )
        unknown = [task for task in tasks if task not in _TASKS]
        if unknown:
            raise ValueError(
                f"COCOEvaluator knows the tasks {', '.join(_TASKS)}; got {', '.join(map(repr, unknown))}."
            )
        return tasks

    def _checked_limits(self, most: int | None) -> list[int]:
        if most is not None and most < 1:
            raise ValueError(f"max_dets_per_image must be at least 1, got {most}.")
        if most is not None and most < _AR_LIMITS[-1]:
            self._logger.warning(
                "max_dets_per_image=%d: AR@%d needs %d detections, and AP is measured on these.",
                most,
                _AR_LIMITS[-1],
                _AR_LIMITS[-1],
            )
        return sorted((*_AR_LIMITS, most or _DEFAULT_LIMIT))

    def _load_truth(self, allow_cached: bool) -> COCO:
        json_file = self._metadata.get("json_file")
        if json_file:
            self._truth_source = json_file
            return read_truth(json_file)
        self._truth_source = f"dataset {self._dataset_name}"
        self._logger.info("%s has no json_file; its dicts are converted to COCO format.", self._dataset_name)
        if self._output_dir is None:
            return index_truth(convert_to_coco_dict(self._dataset_name), self._truth_source)
        converted = os.path.join(self._output_dir, f"{self._dataset_name}_coco_format.json")
        convert_to_coco_json(self._dataset_name, converted, allow_cached=allow_cached)
        self._truth_source = converted
        return read_truth(converted)

    def reset(self) -> None:
        self._predictions = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Take in one batch.

        Args:
            inputs: dicts with ``image_id``.
            outputs: dicts with ``instances`` (pred_boxes, scores, pred_classes, optional pred_masks of the
                original image's size) and/or ``proposals`` (proposal_boxes, objectness_logits).
        """
        for given, output in zip(inputs, outputs):
            prediction: dict[str, Any] = {"image_id": given["image_id"]}
            if "instances" in output:
                found = output["instances"].to(self._cpu_device)
                prediction["instances"] = instances_to_coco_json(found, given["image_id"])
            if "proposals" in output:
                prediction["proposals"] = output["proposals"].to(self._cpu_device)
            if len(prediction) > 1:
                self._predictions.append(prediction)

    def evaluate(self, img_ids: Sequence[int] | None = None) -> OrderedDict[str, dict[str, float]]:
        """Metrics of everything processed since ``reset``; empty on all processes but the first.

        Args:
            img_ids: evaluate these images only; None for all images of the dataset.
        """
        predictions = self._gathered()
        if not comm.is_main_process():
            return OrderedDict()
        self._results = OrderedDict()
        if not predictions:
            self._logger.warning(
                "COCOEvaluator was given no predictions: the model gave neither instances nor proposals, "
                "or the data loader was empty."
            )
            return self._results
        if self._output_dir:
            path = os.path.join(self._output_dir, "instances_predictions.pth")
            write_results(path, lambda stream: _save_predictions(predictions, stream))
        predictions = self._one_per_image(predictions)
        if any("proposals" in p for p in predictions):
            self._eval_box_proposals([p for p in predictions if "proposals" in p])
        if any("instances" in p for p in predictions):
            self._eval_predictions([p for p in predictions if "instances" in p], img_ids)
        return copy.deepcopy(self._results)

    def _gathered(self) -> list[dict[str, Any]]:
        if not self._distributed:
            return self._predictions
        comm.synchronize()
        parts = comm.gather(self._predictions, dst=0)
        return list(itertools.chain.from_iterable(parts))

    def _one_per_image(self, predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Of an image that came twice the first prediction counts; the second would be false positives."""
        counts = Counter(
            (p["image_id"], kind) for p in predictions for kind in ("instances", "proposals") if kind in p
        )
        repeated = sorted({str(image_id) for (image_id, _), n in counts.items() if n > 1})
        if not repeated:
            return predictions
        self._logger.warning(
            "%d images were processed more than once (image_id %s%s); the first prediction of each counts. "
            "Are image ids unique in %s?",
            len(repeated),
            ", ".join(repeated[:5]),
            ", ..." if len(repeated) > 5 else "",
            self._dataset_name,
        )
        seen: set[tuple[Any, str]] = set()
        kept = []
        for prediction in predictions:
            fresh = {
                k: v
                for k, v in prediction.items()
                if k == "image_id" or (prediction["image_id"], k) not in seen
            }
            seen.update((prediction["image_id"], kind) for kind in fresh)
            if len(fresh) > 1:
                kept.append(fresh)
        return kept

    # ------------------------------------------------------------------ boxes and masks

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Sequence[int] | None = None
    ) -> None:
        rows = [dict(row) for row in itertools.chain.from_iterable(p["instances"] for p in predictions)]
        tasks = self._tasks or _tasks_of(rows)
        contiguous_to_category = self._category_ids()
        for row in rows:
            row["category_id"] = self._category_of(row, contiguous_to_category)
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            self._logger.info("Writing %d detections to %s", len(rows), path)
            write_results(
                path,
                lambda stream: stream.write(json.dumps(rows).encode()),
                needed=not self._do_evaluation,
            )
        if not self._do_evaluation:
            self._logger.info(
                "%s has no annotations: predictions are written, not evaluated.", self._truth_source
            )
            return
        self._check_images(predictions, rows)
        if not self._coco_api.anns:
            self._logger.warning(
                "%s lists no annotation at all: there is nothing to find, so every metric is NaN.",
                self._truth_source,
            )
        for task in tasks:
            self._results[task] = self._measure(task, rows, contiguous_to_category, img_ids)

    def _measure(
        self,
        task: str,
        rows: list[dict[str, Any]],
        category_ids: Mapping[int, int],
        img_ids: Sequence[int] | None,
    ) -> dict[str, float]:
        nothing = dict.fromkeys(metrics.METRICS, float("nan"))
        if not rows:
            self._logger.warning("No detection in any image: %s metrics are NaN.", task)
            return nothing
        if not self._coco_api.anns:
            return nothing
        if task == "segm" and "segmentation" not in rows[0]:
            raise ValueError(
                "COCOEvaluator was asked for 'segm', but the model's instances have no pred_masks. "
                "Switch MODEL.MASK_ON on, or evaluate tasks=('bbox',)."
            )
        truth = self._coco_api
        if task == "segm":
            truth = without_missing_masks(truth, self._truth_source)
        curves = metrics.match_detections(truth, rows, task, self._max_dets, img_ids, self._use_fast_impl)
        self._logger.info("COCO summary for %s:\n%s", task, "\n".join(metrics.summary_lines(curves)))
        overall = metrics.average_precision(curves)
        self._logger.info("Evaluation results for %s:\n%s", task, create_small_table(overall))
        if not all(math.isfinite(value) for value in overall.values()):
            self._logger.info("NaN stands for sizes that the ground truth does not have.")
        return overall | self._per_category(task, curves, category_ids)

    def _per_category(self, task: str, curves: Curves, category_ids: Mapping[int, int]) -> dict[str, float]:
        names = self._category_names(category_ids)
        if len(names) <= 1:
            return {}
        by_category = metrics.average_precision_per_category(curves)
        named = {names.get(cat, str(cat)): ap for cat, ap in by_category.items()}
        columns = min(6, 2 * len(named))
        cells: list[Any] = [cell for pair in named.items() for cell in pair]
        table = tabulate(
            [cells[start : start + columns] for start in range(0, len(cells), columns)],
            headers=["category", "AP"] * (columns // 2),
            tablefmt="pipe",
            floatfmt=".3f",
            numalign="left",
        )
        self._logger.info("Per-category %s AP:\n%s", task, table)
        return {f"AP-{name}": ap for name, ap in named.items()}

    # ------------------------------------------------------------------ ids

    def _category_ids(self) -> dict[int, int]:
        """{class of the model: category id of the truth}."""
        if (
            self._metadata.get("thing_dataset_id_to_contiguous_id") is None
            and self._dataset_name in DatasetCatalog
        ):
            # Reading a COCO dataset is what enters the mapping into its metadata.
            DatasetCatalog.get(self._dataset_name)
        forward = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if forward is not None:
            return {contiguous: category for category, contiguous in forward.items()}
        if self._dataset_name in DatasetCatalog and self._metadata.get("thing_classes") is not None:
            # Dicts whose category_id already is the class; the json they name must use the same numbers.
            return {k: k for k in range(len(self._metadata.get("thing_classes")))}
        return dict(enumerate(sorted(self._coco_api.getCatIds())))

    def _category_of(self, row: Mapping[str, Any], category_ids: Mapping[int, int]) -> int:
        try:
            return category_ids[row["category_id"]]
        except KeyError:
            # AssertionError, not ValueError, because that is what callers of the original catch.
            raise AssertionError(
                f"image {row['image_id']}: the model predicts class {row['category_id']}, but "
                f"{self._dataset_name} has {len(category_ids)} classes (0..{len(category_ids) - 1}). "
                "Make MODEL.ROI_HEADS.NUM_CLASSES match."
            ) from None

    def _category_names(self, category_ids: Mapping[int, int]) -> dict[int, str]:
        """{category id of the truth: name}; the metadata's names win over the json's."""
        names = {c["id"]: str(c.get("name", c["id"])) for c in self._coco_api.dataset["categories"]}
        given = self._metadata.get("thing_classes")
        if given is not None:
            names |= {category_ids[k]: name for k, name in enumerate(given) if k in category_ids}
        return names

    def _check_images(
        self, predictions: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        known = set(self._coco_api.getImgIds())
        strangers = sorted({str(row["image_id"]) for row in rows if row["image_id"] not in known})
        if strangers:
            raise ValueError(
                f"predictions for {len(strangers)} images that {self._truth_source} does not list "
                f"(image_id {', '.join(strangers[:5])}): evaluator and data loader use different datasets, "
                "or the mapper changed image_id."
            )
        seen = {p["image_id"] for p in predictions}
        unseen = [i for i in known if i not in seen and self._coco_api.imgToAnns.get(i)]
        if unseen:
            self._logger.warning(
                "%d of %d images were not processed but have annotations; these count as missed.",
                len(unseen),
                len(known),
            )
        foreign = {row["category_id"] for row in rows} - set(self._coco_api.getCatIds())
        if foreign:
            self._logger.warning(
                "Predictions of category ids %s are ignored: %s does not list them.",
                sorted(foreign),
                self._truth_source,
            )

    # ------------------------------------------------------------------ proposals

    def _eval_box_proposals(self, predictions: list[dict[str, Any]]) -> None:
        if self._output_dir:
            # The file that DATASETS.PROPOSAL_FILES_* of Detectron2 read.
            proposals = [p["proposals"] for p in predictions]
            content = {
                "boxes": [p.proposal_boxes.tensor.numpy() for p in proposals],
                "objectness_logits": [p.objectness_logits.numpy() for p in proposals],
                "ids": [p["image_id"] for p in predictions],
                "bbox_mode": BoxMode.XYXY_ABS.value,
            }
            write_results(
                os.path.join(self._output_dir, "box_proposals.pkl"),
                lambda stream: pickle.dump(content, stream),
                needed=not self._do_evaluation,
            )
        if not self._do_evaluation:
            self._logger.info(
                "%s has no annotations: proposals are written, not evaluated.", self._truth_source
            )
            return
        recall = metrics.proposal_metrics(predictions, self._coco_api)
        self._logger.info("Proposal metrics:\n%s", create_small_table(recall))
        self._results["box_proposals"] = recall


def instances_to_coco_json(instances: Instances, img_id: int) -> list[dict[str, Any]]:
    """One image's detections in COCO's results format.

    Args:
        instances: on the CPU, with ``pred_boxes`` (XYXY, absolute pixels of the original image), ``scores``,
            ``pred_classes``; ``pred_masks`` (N, H, W) bool where masks are wanted.
        img_id: image_id of the rows.
    Returns:
        One dict per detection: image_id, category_id (class of the model), bbox (XYWH), score; with masks
        segmentation (compressed RLE, counts as str).
    """
    count = len(instances)
    if count == 0:
        return []
    if instances.has("pred_keypoints"):
        raise NotImplementedError(
            outside_message("keypoint evaluation (pred_keypoints in the model's instances)")
        )
    boxes = BoxMode.convert(instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    scores = instances.scores.tolist()
    classes = instances.pred_classes.tolist()
    rows = [
        {"image_id": img_id, "category_id": classes[k], "bbox": boxes[k], "score": scores[k]}
        for k in range(count)
    ]
    if instances.has("pred_masks"):
        for row, code in zip(rows, encode_masks(instances.pred_masks, instances.pred_boxes.tensor)):
            row["segmentation"] = code
    return rows


def _tasks_of(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return _TASKS if any("segmentation" in row for row in rows) else _TASKS[:1]


def _save_predictions(predictions: Sequence[Mapping[str, Any]], handle: IO[bytes]) -> None:
    has_tensors = any("proposals" in prediction for prediction in predictions)
    # torch.save asks of every number whether it is part of a tensor, which takes most of its time.
    torch.save(
        [_plain(prediction) for prediction in predictions],
        handle,
        pickle_module=pickle if has_tensors else _PickleWithoutTensors,
    )


class _PickleWithoutTensors:
    """The part of the module ``pickle`` that torch.save uses, for content without tensors."""

    class Pickler:
        def __init__(self, file: IO[bytes], protocol: int | None = None) -> None:
            self._pickler = pickle.Pickler(file, protocol)

        def dump(self, content: Any) -> None:
            self._pickler.dump(content)


def _plain(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """The prediction in tensors, numbers and text only, so that the file loads without unpickling classes."""
    if "proposals" not in prediction:
        return dict(prediction)
    proposals = prediction["proposals"]
    return {
        **prediction,
        "proposals": {
            "image_size": tuple(proposals.image_size),
            "proposal_boxes": proposals.proposal_boxes.tensor,
            "objectness_logits": proposals.objectness_logits,
        },
    }
