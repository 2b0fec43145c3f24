"""From dataset names to loaders: which dicts, which order, which batches.

``build_detection_train_loader`` and ``build_detection_test_loader`` take a config, or plain arguments.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from termcolor import colored
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler

from detectron2._outside import outside_message
from detectron2.config import configurable
from detectron2.utils.comm import get_world_size
from detectron2.utils.env import seed_all_rng

from .catalog import DatasetCatalog, MetadataCatalog
from .common import AspectRatioGroupedDataset, DatasetFromList, MapDataset, ToIterableDataset
from .dataset_mapper import DatasetMapper
from .detection_utils import check_metadata_consistency
from .samplers import (
    InferenceSampler,
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)

__all__ = [
    "build_batch_data_loader",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "filter_images_with_few_keypoints",
    "filter_images_with_only_crowd_annotations",
    "get_detection_dataset_dicts",
    "load_proposals_into_dataset",
    "print_instances_class_histogram",
    "trivial_batch_collator",
    "worker_init_reset_seed",
]

logger = logging.getLogger(__name__)

Sample = dict[str, Any]


# ---------------------------------------------------------------------------------- dataset dicts


def get_detection_dataset_dicts(
    names: str | Sequence[str],
    filter_empty: bool = True,
    min_keypoints: int = 0,
    proposal_files: Sequence[str] | None = None,
    check_consistency: bool = True,
) -> Any:
    """Load registered datasets and put them one after the other.

    Args:
        names: one or more registered names.
        filter_empty: leave out images without any annotation that is not a crowd.
        min_keypoints: leave out images with fewer labelled keypoints; 0 keeps all.
        proposal_files: a feature of Detectron2 itself; ImportError when used.
        check_consistency: compare the class names of the datasets and log how often each class occurs.
    Returns:
        list[dict]; or a torch dataset where the registered functions return such.
    Raises:
        AssertionError: no name, or nothing left after filtering.
        KeyError: a name is not registered.
        ValueError: two of the datasets have different classes.
    """
    if proposal_files:
        load_proposals_into_dataset([], proposal_files[0])
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise AssertionError("no dataset name given: DATASETS.TRAIN or DATASETS.TEST is empty.")

    parts = [DatasetCatalog.get(name) for name in names]
    if all(isinstance(part, Dataset) for part in parts):
        return ConcatDataset(parts) if len(parts) > 1 else parts[0]
    for name, part in zip(names, parts):
        if len(part) == 0:
            raise AssertionError(f"dataset {name!r} has no images.")

    records = [record for part in parts for record in part]
    if "annotations" in records[0]:
        if filter_empty:
            records = filter_images_with_only_crowd_annotations(records)
        if min_keypoints > 0 and filter_empty:
            records = filter_images_with_few_keypoints(records, min_keypoints)
        if check_consistency:
            _check_and_count_classes(names, records)
    if not records:
        raise AssertionError(
            f"no image of {', '.join(names)} has an annotation to train on. "
            "To keep images without objects, set DATALOADER.FILTER_EMPTY_ANNOTATIONS to False."
        )
    return records


def _check_and_count_classes(names: Sequence[str], records: list[Sample]) -> None:
    # Class names are optional metadata: without them there is nothing to compare.
    if any(MetadataCatalog.get(name).get("thing_classes") is None for name in names):
        return
    check_metadata_consistency("thing_classes", names)
    print_instances_class_histogram(records, MetadataCatalog.get(names[0]).thing_classes)


def filter_images_with_only_crowd_annotations(dataset_dicts: list[Sample]) -> list[Sample]:
    """Keep images with at least one annotation whose "iscrowd" is 0 or absent."""
    useful = [d for d in dataset_dicts if any(a.get("iscrowd", 0) == 0 for a in d["annotations"])]
    logger.info(
        "%d of %d images have annotations to train on; the others are left out.",
        len(useful),
        len(dataset_dicts),
    )
    return useful


def filter_images_with_few_keypoints(
    dataset_dicts: list[Sample], min_keypoints_per_image: int
) -> list[Sample]:
    """Keep images whose annotations together have at least so many keypoints with a visibility above 0."""
    useful = [d for d in dataset_dicts if _labelled_keypoints(d["annotations"]) >= min_keypoints_per_image]
    logger.info(
        "%d of %d images have at least %d keypoints; the others are left out.",
        len(useful),
        len(dataset_dicts),
        min_keypoints_per_image,
    )
    return useful


def _labelled_keypoints(annotations: list[dict[str, Any]]) -> int:
    return sum(int(np.count_nonzero(np.asarray(a.get("keypoints", ()))[2::3] > 0)) for a in annotations)


def load_proposals_into_dataset(dataset_dicts: list[Sample], proposal_file: str) -> list[Sample]:
    """Outside the subset."""
    raise ImportError(outside_message("MODEL.LOAD_PROPOSALS (precomputed proposals)"))


def print_instances_class_histogram(dataset_dicts: list[Sample], class_names: Sequence[str]) -> None:
    """Log how many annotations, crowds left out, each class has.

    Raises:
        AssertionError: a category id is not in 0..len(class_names)-1; names the image.
    """
    counts = np.zeros(len(class_names), dtype=np.int64)
    for record in dataset_dicts:
        for annotation in record["annotations"]:
            if annotation.get("iscrowd", 0):
                continue
            category = annotation["category_id"]
            if not 0 <= category < len(counts):
                raise AssertionError(
                    f"image {record.get('image_id', record.get('file_name'))!r} has category_id {category}, "
                    f"but the dataset has {len(counts)} classes, numbered from 0."
                )
            counts[category] += 1
    logger.info(
        "Instances per class, %d in all:\n%s",
        counts.sum(),
        colored(_histogram_table(class_names, counts), "cyan"),
    )


def _histogram_table(class_names: Sequence[str], counts: np.ndarray, pairs_per_row: int = 3) -> str:
    """Columns "class | instances", several side by side."""
    cells: list[Any] = []
    for name, count in zip(class_names, counts.tolist()):
        cells += [name if len(name) <= 18 else name[:16] + "..", count]
    width = 2 * min(pairs_per_row, max(1, len(class_names)))
    rows = [cells[i : i + width] for i in range(0, len(cells), width)]
    return tabulate(rows, headers=["class", "instances"] * (width // 2), tablefmt="pipe", stralign="left")


# ------------------------------------------------------------------------------------------------ loaders


def trivial_batch_collator(batch: list[Any]) -> list[Any]:
    """A batch is the list of its samples, which may differ in size."""
    return batch


def worker_init_reset_seed(worker_id: int) -> None:
    """Seed numpy, random and torch of a loader worker from the seed that torch gave to it."""
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)


def build_batch_data_loader(
    dataset: Dataset,
    sampler: Iterable[int] | None,
    total_batch_size: int | None,
    *,
    aspect_ratio_grouping: bool = False,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    drop_last: bool = True,
    single_gpu_batch_size: int | None = None,
    prefetch_factor: int = 2,
    persistent_workers: bool = False,
    pin_memory: bool = False,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """Batches of a dataset in a sampler's order.

    The order of the samples, and so the batches, are the same for any number of workers.

    Args:
        dataset: map-style with a sampler, or iterable without.
        sampler: indices of this rank.
        total_batch_size: samples per batch, summed over the ranks.
        aspect_ratio_grouping: batches of only wide or only other images; samples need "width" and "height".
        collate_fn: list of samples -> batch; the list itself when None.
        drop_last: without grouping: drop a last, incomplete batch.
        single_gpu_batch_size: samples per batch and rank, instead of ``total_batch_size``.
        seed: of the loader's own generator, from which the workers' seeds are drawn; torch's global one
            when None.
        kwargs, and the rest: see ``torch.utils.data.DataLoader``.
    Raises:
        AssertionError: the batch size does not fit the number of ranks; a sampler where there must be none.
    """
    batch_size = _batch_size_per_rank(total_batch_size, single_gpu_batch_size)
    if not isinstance(dataset, IterableDataset):
        if sampler is None:
            raise AssertionError("a map-style dataset needs a sampler.")
        # The grouping loader below gets single samples from the workers in turn; the other one whole batches.
        chunk = 1 if aspect_ratio_grouping else batch_size
        dataset = ToIterableDataset(dataset, sampler, shard_chunk_size=chunk)
    elif sampler is not None:
        raise AssertionError("an iterable dataset has its own order: sampler must be None.")

    if num_workers > 0:
        kwargs.update(prefetch_factor=prefetch_factor, persistent_workers=persistent_workers)
    if seed is not None:
        kwargs["generator"] = torch.Generator().manual_seed(seed)
    kwargs.update(num_workers=num_workers, pin_memory=pin_memory, worker_init_fn=worker_init_reset_seed)

    if not aspect_ratio_grouping:
        collate_fn = collate_fn or trivial_batch_collator
        return DataLoader(
            dataset, batch_size=batch_size, drop_last=drop_last, collate_fn=collate_fn, **kwargs
        )
    if not drop_last:
        raise AssertionError(
            "aspect_ratio_grouping always drops incomplete batches: it needs drop_last=True."
        )
    singles = DataLoader(dataset, collate_fn=operator.itemgetter(0), **kwargs)
    batches = AspectRatioGroupedDataset(singles, batch_size)
    return batches if collate_fn is None else MapDataset(batches, collate_fn)


def _batch_size_per_rank(total: int | None, per_rank: int | None) -> int:
    ranks = get_world_size()
    if per_rank:
        if total is not None:
            raise ValueError("give either total_batch_size or single_gpu_batch_size, not both.")
        return per_rank
    if not total or total < 0 or total % ranks:
        raise AssertionError(
            f"a batch of {total} (SOLVER.IMS_PER_BATCH) cannot be shared equally by {ranks} processes: "
            "it must be a positive multiple of their number."
        )
    return total // ranks


def _train_loader_from_config(
    cfg: Any, mapper: Callable[[Sample], Any] | None = None, *, dataset: Any = None, sampler: Any = None
) -> dict[str, Any]:
    if dataset is None:
        dataset = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    if sampler is None and not isinstance(dataset, IterableDataset):
        sampler = _build_train_sampler(cfg, dataset)
    return {
        "dataset": dataset,
        "sampler": sampler,
        "mapper": DatasetMapper(cfg, True) if mapper is None else mapper,
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
    }


def _build_train_sampler(cfg: Any, dataset: Any) -> Sampler:
    wanted = cfg.DATALOADER.SAMPLER_TRAIN
    logger.info("Training sampler: %s", wanted)
    if wanted == "TrainingSampler":
        return TrainingSampler(len(dataset))
    if wanted == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(factors)
    if wanted == "RandomSubsetTrainingSampler":
        return RandomSubsetTrainingSampler(len(dataset), cfg.DATALOADER.RANDOM_SUBSET_RATIO)
    raise ValueError(
        f"DATALOADER.SAMPLER_TRAIN is {wanted!r}: choose TrainingSampler, RepeatFactorTrainingSampler or "
        "RandomSubsetTrainingSampler (with DATALOADER.RANDOM_SUBSET_RATIO)."
    )


@configurable(from_config=_train_loader_from_config)
def build_detection_train_loader(
    dataset: list[Any] | Dataset,
    *,
    mapper: Callable[[Sample], Any] | None,
    sampler: Iterable[int] | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **kwargs: Any,
) -> Any:
    """An endless loader for training; call it with these arguments or with a config.

    Args:
        dataset: dicts, or a torch dataset, map-style or iterable.
        mapper: dict -> sample; a sample that is None is replaced by another one.
        sampler: of dataset indices; TrainingSampler when None. Not with an iterable dataset.
        kwargs, and the rest: see :func:`build_batch_data_loader`.
    """
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    if isinstance(dataset, IterableDataset):
        if sampler is not None:
            raise AssertionError("an iterable dataset has its own order: sampler must be None.")
    elif sampler is None:
        sampler = TrainingSampler(len(dataset))
    elif not isinstance(sampler, Iterable):
        raise AssertionError(f"sampler must be an iterable of dataset indices, not {sampler!r}.")
    if mapper is not None:
        dataset = MapDataset(dataset, mapper)
    return build_batch_data_loader(
        dataset,
        sampler,
        total_batch_size,
        aspect_ratio_grouping=aspect_ratio_grouping,
        num_workers=num_workers,
        collate_fn=collate_fn,
        **kwargs,
    )


def _test_loader_from_config(
    cfg: Any, dataset_name: str | Sequence[str], mapper: Callable[[Sample], Any] | None = None
) -> dict[str, Any]:
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ImportError(outside_message("MODEL.LOAD_PROPOSALS (precomputed proposals)"))
    dataset = get_detection_dataset_dicts(dataset_name, filter_empty=False)
    return {
        "dataset": dataset,
        "mapper": DatasetMapper(cfg, False) if mapper is None else mapper,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "sampler": None if isinstance(dataset, IterableDataset) else InferenceSampler(len(dataset)),
    }


@configurable(from_config=_test_loader_from_config)
def build_detection_test_loader(
    dataset: list[Any] | Dataset,
    *,
    mapper: Callable[[Sample], Any] | None,
    sampler: Iterable[int] | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> DataLoader:
    """A loader that gives every sample once, in order, shared between the ranks.

    Call it with these arguments, or with ``(cfg, dataset_name)``.

    Args:
        dataset: dicts, or a torch dataset, map-style or iterable.
        mapper: dict -> sample.
        sampler: of dataset indices; InferenceSampler when None. Not with an iterable dataset.
        batch_size: samples per batch and rank; the last batch may be smaller.
        collate_fn: list of samples -> batch; the list itself when None.
    """
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    if isinstance(dataset, IterableDataset):
        if sampler is not None:
            raise AssertionError("an iterable dataset has its own order: sampler must be None.")
    elif sampler is None:
        sampler = InferenceSampler(len(dataset))
    if mapper is not None:
        dataset = MapDataset(dataset, mapper)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=False,
        num_workers=num_workers,
        collate_fn=collate_fn or trivial_batch_collator,
    )
