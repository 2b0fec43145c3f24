"""Which detections find which objects? COCO's matching and the curves over it, in numpy.

Protocol: https://cocodataset.org/#detection-eval, as pycocotools carries it out, with the same numbers to the last
bit. It is fast for two reasons. Pairs of a detection and an object are few once those below the lowest IoU threshold
are left out, so the greedy choice runs over them alone, for all images, sizes and thresholds at once. And a precision
curve needs to be known only where a true positive comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pycocotools.mask as mask_coding

__all__ = ["AREAS", "IOU_THRESHOLDS", "RECALL_THRESHOLDS", "Curves", "match"]

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
# Size classes by area in pixels, both ends included.
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}

_RANGES = np.array(list(AREAS.values()), dtype=np.float64)
# An IoU of exactly 1 may be rounded: the highest threshold that can be asked for is a little lower.
_LIMITS = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
# Pairs of detection and object that are compared at a time, which bounds the memory.
_PAIRS_AT_A_TIME = 1 << 21


@dataclass(frozen=True)
class Curves:
    """What was found, -1 where there was nothing to find.

    Attributes:
        precision: (IoU thresholds, recall thresholds, categories, sizes), at the highest limit of detections.
        recall: (IoU thresholds, categories, sizes, limits).
        category_ids: of the truth, ascending.
        max_dets: limits of detections per image and category, ascending.
    """

    precision: np.ndarray
    recall: np.ndarray
    category_ids: list[int]
    max_dets: list[int]


@dataclass
class _Objects:
    """Detections or truth, sorted by group: one group is one category in one image."""

    category: np.ndarray  # (N,) index
    group: np.ndarray  # (N,)
    area: np.ndarray  # (N,) pixels
    crowd: np.ndarray  # (N,) bool
    rows: list[Mapping[str, Any]]
    score: np.ndarray  # (N,)
    rank: np.ndarray  # (N,) within the group, by score

    def __len__(self) -> int:
        return len(self.rows)


def match(
    truth: Any,
    detections: Sequence[Mapping[str, Any]],
    iou_type: str,
    max_dets: Sequence[int],
    image_ids: Any,
) -> Curves:
    """Precision and recall of detections.

    Args:
        truth: a ``COCO`` object whose annotations have area and iscrowd.
        detections: rows of COCO's results format; "bbox" or "segmentation" is read.
        iou_type: "bbox" or "segm".
        max_dets: limits of detections per image and category.
        image_ids: evaluate these only; None for all.
    """
    category_ids = sorted(truth.getCatIds())
    images = sorted(set(truth.getImgIds() if image_ids is None else image_ids))
    place = {image_id: i for i, image_id in enumerate(images)}
    number = {category_id: k for k, category_id in enumerate(category_ids)}
    limits = sorted(max_dets)
    found = _sorted(detections, place, number)
    wanted = _sorted(truth.dataset["annotations"], place, number)
    _keep(found, found.rank < limits[-1])
    find_pairs = _mask_pairs(found, wanted, truth) if iou_type == "segm" else _box_pairs(found, wanted)
    pairs = [pair for pair in find_pairs if len(pair[0])]
    det, obj, iou = (np.concatenate(parts) for parts in zip(*pairs)) if pairs else (np.zeros(0, int),) * 3

    ignored = wanted.crowd | _out_of_range(wanted.area)  # (A, objects)
    with_pairs, hit, hit_ignored = _choose(det, obj, iou, found.group, wanted.crowd, ignored)
    return Curves(
        *_curves(found, with_pairs, hit, hit_ignored, _countable(wanted, ignored, len(category_ids)), limits),
        category_ids,
        limits,
    )


# ------------------------------------------------------------------------------------- tables of objects


def _sorted(
    rows: Sequence[Mapping[str, Any]], place: Mapping[Any, int], number: Mapping[Any, int]
) -> _Objects:
    """Rows of known images and categories, by category, image and falling score; equal scores in their order."""
    rows = [row for row in rows if row["image_id"] in place and row["category_id"] in number]
    category = np.array([number[row["category_id"]] for row in rows], dtype=np.int64)
    group = category * len(place) + np.array([place[row["image_id"]] for row in rows], dtype=np.int64)
    score = np.array([row.get("score", 0.0) for row in rows], dtype=np.float64)
    order = np.lexsort((-score, group))
    group = group[order]
    rows = [rows[i] for i in order.tolist()]
    return _Objects(
        category=category[order],
        group=group,
        area=np.array([row.get("area", 0.0) for row in rows], dtype=np.float64),
        crowd=np.array([bool(row.get("iscrowd", 0)) for row in rows], dtype=np.bool_),
        rows=rows,
        score=score[order],
        rank=np.arange(len(rows)) - np.searchsorted(group, group),
    )


def _keep(objects: _Objects, kept: np.ndarray) -> None:
    if kept.all():
        return
    objects.rows = [row for row, stays in zip(objects.rows, kept.tolist()) if stays]
    for name in ("category", "group", "area", "crowd", "score", "rank"):
        setattr(objects, name, getattr(objects, name)[kept])


def _out_of_range(area: np.ndarray) -> np.ndarray:
    """(A, N) bool."""
    return (area < _RANGES[:, :1]) | (area > _RANGES[:, 1:])


def _countable(wanted: _Objects, ignored: np.ndarray, categories: int) -> np.ndarray:
    """(A, categories): how many objects there are to find."""
    counts = [np.bincount(wanted.category[~row], minlength=categories) for row in ignored]
    return np.stack(counts)


# ------------------------------------------------------------------- pairs above the lowest IoU threshold

_Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]  # detection, object, IoU


def _all_pairs(found: _Objects, wanted: _Objects) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(detection, object) of the same group, in portions; ascending in both."""
    first = np.searchsorted(wanted.group, found.group, "left")
    count = np.searchsorted(wanted.group, found.group, "right") - first
    total = np.cumsum(count)
    start = 0
    while start < len(found):
        done = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, done + _PAIRS_AT_A_TIME, "right")))
        some = count[start:stop]
        det = np.repeat(np.arange(start, stop), some)
        within = np.arange(len(det)) - np.repeat(np.cumsum(some) - some, some)
        yield det, np.repeat(first[start:stop], some) + within
        start = stop


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection of N boxes XYWH with N others, pixels; 0 where they do not meet."""
    sides = np.minimum(a[:, 2:] + a[:, :2], b[:, 2:] + b[:, :2]) - np.maximum(a[:, :2], b[:, :2])
    return np.where((sides > 0).all(axis=1), sides[:, 0] * sides[:, 1], 0.0)


def _ratio(shared: np.ndarray, det_area: np.ndarray, obj_area: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Intersection over union; with a crowd, over the detection, since it may be any part of it."""
    union = np.where(crowd, det_area, det_area + obj_area - shared)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(shared > 0, shared / union, 0.0)


def _box_pairs(found: _Objects, wanted: _Objects) -> Iterator[_Pairs]:
    det_boxes, obj_boxes = (
        np.array([row["bbox"] for row in side.rows], dtype=np.float64).reshape(-1, 4)
        for side in (found, wanted)
    )
    found.area = det_boxes[:, 2] * det_boxes[:, 3]
    obj_area = obj_boxes[:, 2] * obj_boxes[:, 3]
    for det, obj in _all_pairs(found, wanted):
        shared = _overlap(det_boxes[det], obj_boxes[obj])
        iou = _ratio(shared, found.area[det], obj_area[obj], wanted.crowd[obj])
        near = iou >= _LIMITS[0]
        yield det[near], obj[near], iou[near]


def _mask_pairs(found: _Objects, wanted: _Objects, truth: Any) -> Iterator[_Pairs]:
    codes = [row["segmentation"] for row in found.rows]
    found.area = _areas_of(codes)
    needed = np.bincount(found.group, minlength=1 + wanted.group.max(initial=0))[wanted.group] > 0
    truth_codes = _truth_codes(wanted.rows, needed.tolist(), truth)
    det_boxes, obj_boxes = _boxes_of(codes), _boxes_of(truth_codes)
    obj_area = _areas_of(truth_codes)
    for det, obj in _all_pairs(found, wanted):
        # No mask is larger than its box: most pairs are too far apart whatever the masks look like.
        most = np.minimum(
            _overlap(det_boxes[det], obj_boxes[obj]), np.minimum(found.area[det], obj_area[obj])
        )
        near = _ratio(most, found.area[det], obj_area[obj], wanted.crowd[obj]) >= _LIMITS[0] - 1e-9
        det, obj = det[near], obj[near]
        iou = _mask_ious(det, obj, found.group[det], codes, truth_codes, wanted.crowd)
        near = iou >= _LIMITS[0]
        yield det[near], obj[near], iou[near]


def _areas_of(codes: list[Any]) -> np.ndarray:
    # pycocotools counts the masks of one call in a byte.
    parts = [mask_coding.area(codes[start : start + 255]) for start in range(0, len(codes), 255)]
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)


def _starts(numbers: np.ndarray) -> np.ndarray:
    """Where the runs of equal numbers begin; numbers are not negative."""
    return np.flatnonzero(np.diff(numbers, prepend=-1))


def _boxes_of(codes: list[Any]) -> np.ndarray:
    return (
        np.asarray(mask_coding.toBbox(codes), dtype=np.float64).reshape(-1, 4) if codes else np.zeros((0, 4))
    )


def _truth_codes(rows: Sequence[Mapping[str, Any]], needed: Sequence[bool], truth: Any) -> list[Any]:
    """Compressed RLE of each annotation; an empty mask where none is needed."""
    empty = mask_coding.encode(np.zeros((1, 1), dtype=np.uint8, order="F"))
    codes = []
    for row, wanted in zip(rows, needed):
        mask = row["segmentation"]
        if not wanted:
            mask = empty
        elif isinstance(mask, list) or isinstance(mask["counts"], list):
            image = truth.imgs[row["image_id"]]
            mask = mask_coding.frPyObjects(mask, image["height"], image["width"])
            if isinstance(mask, list):
                mask = mask_coding.merge(mask) if len(mask) > 1 else mask[0]
        codes.append(mask)
    return codes


def _mask_ious(
    det: np.ndarray,
    obj: np.ndarray,
    group: np.ndarray,
    codes: list[Any],
    truth_codes: list[Any],
    crowd: np.ndarray,
) -> np.ndarray:
    """(pairs,) exact IoU of masks, computed group by group."""
    iou = np.zeros(len(det))
    starts = _starts(group)
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(det)]):
        some_det = det[start:stop]
        new = np.diff(some_det, prepend=-1) > 0
        # The objects of a group are neighbours in the list.
        lowest, highest = obj[start:stop].min(), obj[start:stop].max() + 1
        table = mask_coding.iou(
            [codes[i] for i in some_det[new].tolist()],
            truth_codes[lowest:highest],
            crowd[lowest:highest].tolist(),
        )
        iou[start:stop] = table[np.cumsum(new) - 1, obj[start:stop] - lowest]
    return iou


# ----------------------------------------------------------------------------------- who gets which object


def _choose(
    det: np.ndarray,
    obj: np.ndarray,
    iou: np.ndarray,
    group: np.ndarray,
    crowd: np.ndarray,
    ignored: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detections choose in the order of their scores: the free object with the highest IoU at or above the threshold;
    objects that are ignored only where there is no other, and crowds any number of times.

    Args:
        det, obj, iou: (P,) pairs, sorted by detection.
        group: (detections,).
        crowd: (objects,).
        ignored: (A, objects): crowds, and what is not of the size.
    Returns:
        (detections that have a pair (D,), which of them hit (A, T, D), which hit an ignored object (A, T, D))
    """
    order = np.lexsort((obj, iou, det))
    det, obj, iou = det[order], obj[order], iou[order]
    first = _starts(det)
    chooser, count = det[first], np.diff(first, append=len(det))
    preference = np.arange(len(det)) - np.repeat(first, count) + 1  # 1 for the lowest IoU of a detection
    above_any = len(det) + 1

    sizes, thresholds = len(_RANGES), len(_LIMITS)
    hit = np.zeros((sizes, thresholds, len(chooser)), dtype=np.bool_)
    hit_ignored = np.zeros_like(hit)
    taken = np.zeros((sizes, thresholds, len(crowd)), dtype=np.bool_)
    # In turn r choose all detections that are the r-th of their group: no two of them want the same object.
    turn = np.arange(len(chooser)) - np.searchsorted(group[chooser], group[chooser])
    for who in (
        np.split(np.argsort(turn, kind="stable"), np.cumsum(np.bincount(turn))[:-1]) if len(chooser) else ()
    ):
        pairs = np.repeat(first[who] - np.cumsum(count[who]) + count[who], count[who]) + np.arange(
            count[who].sum()
        )
        segment = np.cumsum(count[who]) - count[who]
        wish = obj[pairs]
        free = (iou[pairs] >= _LIMITS[:, None]) & (~taken[:, :, wish] | crowd[wish])  # (A, T, pairs)
        value = preference[pairs] + above_any * ~ignored[:, None, wish]
        best = np.maximum.reduceat(np.where(free, value, 0), segment, axis=2)  # (A, T, who)
        size, threshold, k = best.nonzero()
        won = obj[first[who[k]] + best[size, threshold, k] % above_any - 1]
        taken[size, threshold, won] = True
        hit[size, threshold, who[k]] = True
        hit_ignored[size, threshold, who[k]] = ignored[size, won]
    return chooser, hit, hit_ignored


# ------------------------------------------------------------------------------------------------ curves


def _curves(
    found: _Objects,
    with_pairs: np.ndarray,
    hit: np.ndarray,
    hit_ignored: np.ndarray,
    countable: np.ndarray,
    limits: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """(precision (T, R, K, A), recall (T, K, A, M)); see :class:`Curves`."""
    sizes, categories = countable.shape
    precision = -np.ones((len(_LIMITS), len(RECALL_THRESHOLDS), categories, sizes))
    recall = -np.ones((len(_LIMITS), categories, sizes, len(limits)))
    outside = _out_of_range(found.area)
    pair_of = np.full(len(found), -1)
    pair_of[with_pairs] = np.arange(len(with_pairs))
    # Of equal scores the earlier image comes first.
    order = np.lexsort((-found.score, found.category))
    bounds = np.searchsorted(found.category[order], np.arange(categories + 1))
    for k in range(categories):
        if not countable[:, k].any():
            continue
        members = order[bounds[k] : bounds[k + 1]]
        paired = np.flatnonzero(pair_of[members] >= 0)
        choice = pair_of[members[paired]]
        # Neither right nor wrong: hits of ignored objects, and misses that are not of the size.
        uncounted = np.repeat(outside[:, None, members], len(_LIMITS), axis=1)  # (A, T, n)
        uncounted[:, :, paired] = np.where(
            hit[:, :, choice], hit_ignored[:, :, choice], uncounted[:, :, paired]
        )
        right = hit[:, :, choice] & ~hit_ignored[:, :, choice]  # (A, T, paired)
        seen = np.cumsum(~uncounted, axis=2, dtype=np.int32)[:, :, paired]
        rank = found.rank[members[paired]]
        for a in np.flatnonzero(countable[:, k]).tolist():
            objects = countable[a, k]
            for m, limit in enumerate(limits):
                recall[:, k, a, m] = right[a][:, rank < limit].sum(axis=1) / objects
            # The true positive at which each recall threshold is reached.
            reached = np.searchsorted(np.arange(1, objects + 1) / objects, RECALL_THRESHOLDS, "left")
            for t in range(len(_LIMITS)):
                precision[t, :, k, a] = _precision(seen[a, t][right[a, t]], reached)
    return precision, recall


def _precision(seen: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """(R,) highest precision at each recall threshold or beyond it, 0 where the threshold is not reached.

    Args:
        seen: (true positives,) detections up to each of them that count.
        reached: (R,) number of the true positive, from 0, at which each threshold is reached.
    """
    curve = np.zeros(len(reached))
    hits = np.arange(1, len(seen) + 1, dtype=np.float64)
    best = np.maximum.accumulate((hits / (seen + np.spacing(1)))[::-1])[::-1]
    there = reached < len(seen)
    curve[there] = best[reached[there]]
    return curve
