"""Which model, on which images? A run or a config -> model in eval mode; test images -> batches of one size."""

from __future__ import annotations

import itertools
import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

from d2_frozen import tasks, train_net
from d2_frozen.data.workers import hand_on
from d2_frozen.engine.checkpoint import frozen_parts
from d2_frozen.study.cka.estimator import MIN_EXAMPLES
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng

logger = logging.getLogger("d2_frozen.study")

Sample = dict[str, Any]
# Images where --images does not say how many.
DEFAULT_IMAGES = 512


@dataclass(frozen=True)
class ModelSource:
    """What ``--run``, ``--config-file`` and ``--options`` name; one of the first two is empty."""

    run: str = ""
    config_file: str = ""
    options: tuple[str, ...] = ()

    def open(self, split: str) -> TrainedModel:
        """Config, data and model, with all of its weights and in eval mode.

        Args:
            split: "test" or "train": which images DATASETS.TEST has then.
        Raises:
            FileNotFoundError: the folder is no run of train_net, or has no weights.
            ValueError: both or none of run and config file; bad data.
            KeyError, AssertionError: unknown key in the file / in the options.
            CheckpointMismatchError: the weights are those of another backbone, or of another model.
        """
        cfg = self._config(split)
        tasks.task_of(cfg).prepare_datasets(cfg, train=False)
        cfg.freeze()
        if not cfg.MODEL.WEIGHTS:
            logger.warning("MODEL.WEIGHTS is empty: what of the model is trained has random weights.")
        # As train_net does: what the weights leave out (a random frozen backbone) is drawn as it was for training.
        seed_all_rng(max(0, cfg.SEED))
        return TrainedModel(cfg, train_net.evaluation_model(cfg).eval())

    def _config(self, split: str) -> CfgNode:
        if bool(self.run) == bool(self.config_file):
            raise ValueError(
                "name each model by one of a run's folder (--run) and a config (--config-file) with "
                "--options MODEL.WEIGHTS FILE."
            )
        file, options = self.config_file, list(self.options)
        if self.run:
            file = str(Path(self.run, "config.yaml"))
            if not Path(file).is_file():
                raise FileNotFoundError(
                    f"{self.run} is no folder that train_net.py has written: no config.yaml in it."
                )
            # Options may say otherwise: they come later.
            options = ["MODEL.WEIGHTS", _weights_of(Path(self.run)), *options]
        elif not Path(file).is_file():
            raise FileNotFoundError(f"no config file {file}.")
        cfg = train_net.read_config(file, options)
        if split == "train":
            cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
        if not cfg.DATASETS.TEST:
            raise ValueError(f"{file} has no images: DATASETS.{split.upper()} is empty.")
        # Only then the modules inside a frozen backbone are what runs.
        cfg.MODEL.FROZEN.PRECISION = "fp32"
        if "VIDEO" in cfg:
            # A clip is an example: two views of one video would not be independent ones.
            cfg.VIDEO.TEST.CLIPS = cfg.VIDEO.TEST.CROPS = 1
        return cfg


@dataclass(frozen=True)
class TrainedModel:
    """A model and its complete config, data registered."""

    cfg: CfgNode
    network: nn.Module

    def about(self) -> dict[str, Any]:
        """What a reported figure must name."""
        backbones = {name: part.fingerprint() for name, part in frozen_parts(self.network).items()}
        return {
            "weights": self.cfg.MODEL.WEIGHTS,
            "output_dir": self.cfg.OUTPUT_DIR,
            "seed": self.cfg.SEED,
            "iterations": self.cfg.SOLVER.MAX_ITER,
            "frozen": backbones,
        }


def _weights_of(run: Path) -> str:
    final, tag = run / "model_final.pth", run / "last_checkpoint"
    if final.is_file():
        return str(final)
    if tag.is_file() and (run / tag.read_text(encoding="utf-8").strip()).is_file():
        return str(run / tag.read_text(encoding="utf-8").strip())
    raise FileNotFoundError(f"{run} has no weights: neither model_final.pth nor what last_checkpoint names.")


def check_same_input(first: CfgNode, other: CfgNode) -> None:
    """
    Raises:
        ValueError: the models take channels in another order.
    """
    if first.INPUT.FORMAT != other.INPUT.FORMAT:
        raise ValueError(
            f"the first model takes {first.INPUT.FORMAT} images (INPUT.FORMAT) and the other {other.INPUT.FORMAT}, "
            "but both get the same."
        )


def side_of(cfg: CfgNode) -> int:
    """Side in pixels to which images are brought: that of the config's training crop, or its test size.

    Raises:
        ValueError: the config has none.
    """
    side = cfg.INPUT.SCALE_CROP.SIZE if cfg.INPUT.AUGMENTATION == "scale_crop" else cfg.INPUT.MIN_SIZE_TEST
    if side < 1:
        raise ValueError(f"the config gives images no size (INPUT.MIN_SIZE_TEST is {side}); give --size.")
    return side


class Batches:
    """Batches of test images, or of clips, in an order that depends on the seed alone.

    Flattened maps can be compared only if they have one size, so every image is scaled to a square, whatever its
    aspect ratio; padding would be something that all maps of an image have in common. Clips are square already.

    Args:
        cfg: of a :class:`TrainedModel`.
        images: how many; 0 for all, but at most ``DEFAULT_IMAGES``. What does not fill a batch is left out.
        batch: examples per batch.
        side: in pixels; 0 for :func:`side_of`.
        seed: of the order.
    Raises:
        ValueError: too few images for one batch, or for what was asked; no size.
    """

    def __init__(self, cfg: CfgNode, images: int, batch: int, side: int, seed: int) -> None:
        if batch < MIN_EXAMPLES:
            raise ValueError(
                f"--batch {batch}: the unbiased estimate divides by n (n - 3) for n examples per batch; give at "
                f"least {MIN_EXAMPLES}."
            )
        records = _records_of(cfg)
        name, there = ", ".join(cfg.DATASETS.TEST), len(records)
        if images > there:
            raise ValueError(f"--images {images}, but {name} has {there}. Give at most so many.")
        count = images or min(there, DEFAULT_IMAGES)
        if count < batch:
            raise ValueError(
                f"{count} images are too few for one batch of {batch} (--batch; {name} has {there}). Take more "
                f"images, or smaller batches: the unbiased estimate needs at least {MIN_EXAMPLES} examples in each."
            )
        self.batch = batch
        self.number = count // batch
        self._records = Subset(records, _order(there, seed)[: self.number * batch])
        self.side = side or side_of(cfg)
        self._workers = cfg.DATALOADER.NUM_WORKERS

    @property
    def images(self) -> int:
        return self.number * self.batch

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[list[Sample]]:
        loader: Iterable[Sequence[Sample]] = DataLoader(
            self._records,
            batch_size=self.batch,
            num_workers=self._workers,
            collate_fn=hand_on,
            worker_init_fn=_leave_ctrl_c_to_the_first_process,
        )
        for batch in loader:
            yield [scaled(one, self.side) for one in batch if _was_read(one)]


def first_samples(cfg: CfgNode, count: int, side: int, seed: int) -> list[Sample]:
    """The first of :class:`Batches`, or all where there are fewer: enough to see what the maps are.

    Raises:
        ValueError: none can be read; no size.
    """
    if count < 1:
        raise ValueError(f"--batch {count}: give at least 1.")
    records, side = _records_of(cfg), side or side_of(cfg)
    samples = (records[index] for index in _order(len(records), seed))
    found = [scaled(one, side) for one in itertools.islice(filter(_was_read, samples), count)]
    if not found:
        raise ValueError(f"nothing of {', '.join(cfg.DATASETS.TEST)} can be read.")
    return found


def _records_of(cfg: CfgNode) -> ConcatDataset[Sample]:
    trainer = tasks.task_of(cfg).trainer()
    return ConcatDataset([trainer.build_test_loader(cfg, name).dataset for name in cfg.DATASETS.TEST])


def _order(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def _was_read(sample: Sample) -> bool:
    """A video that cannot be read comes without clip."""
    return "image" in sample or "video" in sample


def scaled(sample: Sample, side: int) -> Sample:
    """With "image" (3, h, w) uint8 as (3, side, side), and results wanted at this size; a clip as it is."""
    if "image" not in sample:
        return sample
    image = sample["image"]
    if tuple(image.shape[-2:]) != (side, side):
        larger = F.interpolate(
            image[None].float(), (side, side), mode="bilinear", align_corners=False, antialias=True
        )[0]
        image = larger.round().clamp(0, 255).to(image.dtype)
    return {**sample, "image": image, "height": side, "width": side}


def _leave_ctrl_c_to_the_first_process(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class StopAsked:
    """Ctrl-C or SIGTERM while the ``with`` block lasts: ``bool(stop)`` is true; a second one ends at once."""

    def __enter__(self) -> StopAsked:
        self._asked = False
        self._before: dict[int, Callable | int | None] = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self._asked

    def _ask(self, number: int, _: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
