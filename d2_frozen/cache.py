"""Fill, look at, check and shrink a feature cache (docs/feature_cache.md).

    python -m d2_frozen.cache build --config-file CONFIG [--processes N] [--part I/N] [KEY VALUE ...]
    python -m d2_frozen.cache info DIR
    python -m d2_frozen.cache verify DIR [--repair]
    python -m d2_frozen.cache prune DIR [--unused-days D] [--max-gb G] [--space ID ...] [--yes]

``build`` goes on where it was stopped, and any number of them may run at once, on one machine or several: what one of
them has written the others do not compute again. Training with MODEL.FROZEN.CACHE.DIR fills the cache too.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader

from d2_frozen import tasks
from d2_frozen.caching import SLOT, FeatureCache, Space, Store, spaces_in
from d2_frozen.caching.store import gib, remove_shard, shard_files
from d2_frozen.data.loader import Place, SampleError, TrainLoader
from d2_frozen.data.workers import hand_on
from d2_frozen.train_net import read_config
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng

logger = logging.getLogger("d2_frozen.cache")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status: 0, or 1 where not all was cached, or something damaged was found."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return args.run(args)
    except (OSError, ValueError, SampleError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2


# ------------------------------------------------------------------------------------------------ build


def build(args: argparse.Namespace) -> int:
    """All views of all training images of a config into its cache."""
    if args.processes < 1:
        raise ValueError(f"--processes is {args.processes}; it must be at least 1.")
    if args.processes > 1:
        return _build_in_processes(args)
    cfg = _config(args.config_file, args.opts)
    builder = Builder(cfg, _part(args.part))
    return 0 if builder.run(Progress(sys.stdout, label=args.label)) else 1


class Builder:
    """
    Args:
        cfg: complete, its datasets prepared.
        part: (i, n): of all (image, view) pairs, the i-th n-th; the others are somebody else's.
    """

    def __init__(self, cfg: CfgNode, part: tuple[int, int] = (0, 1)) -> None:
        from d2_frozen.engine import FrozenCheckpointer
        from d2_frozen.engine.caching import serve_features

        # As training does: a backbone without pretrained weights is a function of SEED.
        seed_all_rng(cfg.SEED)
        trainer = tasks.task_of(cfg).trainer()
        self.model: nn.Module = trainer.build_model(cfg).train()
        FrozenCheckpointer(self.model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
        loader = trainer.build_train_loader(cfg)
        service = serve_features(cfg, self.model, loader)
        if service is None or service.cache is None:
            raise ValueError(
                "MODEL.FROZEN.CACHE.DIR is empty: there is nowhere to build. Set it, and VIEWS, in the config or "
                "behind the command: MODEL.FROZEN.CACHE.DIR cache MODEL.FROZEN.CACHE.VIEWS 8."
            )
        self.cfg, self.loader, self.service, self.cache = cfg, loader, service, service.cache
        images, views = len(loader.dataset), cfg.MODEL.FROZEN.CACHE.VIEWS
        # View by view: a cache that is built in part serves whole passes over the data.
        places = [Place(view * images + index, index) for view in range(views) for index in range(images)]
        self.places = places[part[0] :: part[1]]

    def run(self, progress: Progress) -> bool:
        """False if the cache is full before all is in it.

        Raises:
            SampleError: an image cannot be read, and DATASETS.SKIP_BAD is False.
        """
        from d2_frozen.engine.caching import compute_features

        cache, statistics = self.cache, self.cache.statistics
        present = 0
        size_told = False
        samples = _samples(self.loader, self.places, self.cfg.DATALOADER.NUM_WORKERS)
        for count, sample in enumerate(samples, start=1):
            slot = sample[SLOT]
            if slot.place is not None:
                present += 1
            elif slot.key and not statistics.full:
                compute_features(self.service, sample)
            size_told = size_told or self._tell_size(count)
            note = f"{present} were there  written {gib(statistics.written_bytes)}"
            progress(count, len(self.places), note, skipped=present)
            if statistics.full:
                break
        cache.close()
        progress.end()
        print(
            f"{self.cache.store.folder}: {statistics.written} entries written ({gib(statistics.written_bytes)}), "
            f"{present} were there, of {len(self.places)}."
            + (f" Stopped: {statistics.full}." if statistics.full else "")
        )
        return not statistics.full

    def _tell_size(self, count: int) -> bool:
        """Before the disk is filled: how much it will be; False if no entry is there to tell from."""
        store = self.cache.store
        size = entry_bytes(self.cache)
        if not size:
            return False
        wanted, (room, bound) = size * (len(self.places) - count), store.room()
        print(f"{len(self.places)} entries of about {gib(size)}: {gib(size * len(self.places))} in all.")
        if wanted > room:
            print(
                f"WARNING: {gib(wanted)} are still to be written, but there is room for {gib(room)}: {bound}. Building "
                "stops there; what is cached is used, the rest computed. Fewer VIEWS, MODEL.FROZEN.CACHE.DTYPE bf16, "
                "smaller crops or fewer maps (MODEL.FPN.IN_FEATURES) make it smaller.",
                flush=True,
            )
        return True


def entry_bytes(cache: FeatureCache) -> int:
    """Mean size of an entry, from what is there; 0 if nothing is."""
    cache.flush()
    sizes = [place.length for _, place in cache.store.places()]
    return sum(sizes) // len(sizes) if sizes else 0


def _samples(loader: TrainLoader, places: list[Place], workers: int) -> Iterator[dict[str, Any]]:
    batches = DataLoader(
        loader.dataset,
        sampler=places,  # type: ignore[arg-type]
        batch_size=1,
        num_workers=workers,
        collate_fn=_first,
        generator=torch.Generator(),
    )
    for drawn in batches:
        loader.tell(drawn)
        yield drawn.sample


def _first(batch: list[Any]) -> Any:
    return hand_on(batch)[0]


def _build_in_processes(args: argparse.Namespace) -> int:
    """Processes that know nothing of each other; each has its part."""
    first, parts = _part(args.part)
    command = [sys.executable, "-m", "d2_frozen.cache", "build", "--config-file", args.config_file]
    children = []
    for index in range(args.processes):
        part = f"{first + index * parts}/{args.processes * parts}"
        options = list(args.opts)
        if torch.cuda.is_available() and "MODEL.DEVICE" not in options:
            options += ["MODEL.DEVICE", f"cuda:{index % torch.cuda.device_count()}"]
        label = [f"--label={index + 1}/{args.processes}"]
        children.append(subprocess.Popen([*command, "--part", part, *label, *options]))
    try:
        codes = [child.wait() for child in children]
    except BaseException:
        for child in children:
            child.terminate()
        raise
    return max((abs(code) for code in codes), default=0)


def _part(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise ValueError(f"--part is {text!r}; it is I/N with 0 <= I < N, such as 0/4.")
    return int(index), int(count)


def _config(config_file: str, options: list[str]) -> CfgNode:
    from d2_frozen.engine.caching import check_cache_settings

    try:
        cfg = read_config(config_file, options)
    except (KeyError, AssertionError) as err:  # an unknown key; the message names it
        raise ValueError(err.args[0] if err.args else str(err)) from err
    check_cache_settings(cfg)
    # As Detectron2's default_setup does for a training.
    if (precision := cfg.get("FLOAT32_PRECISION", "")) and torch.cuda.is_available():
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"
    cfg.SEED = max(cfg.SEED, 0)
    try:
        tasks.task_of(cfg).prepare_datasets(cfg, train=True)
    except KeyError as err:  # an unknown dataset
        raise ValueError(err.args[0]) from err
    cfg.freeze()
    return cfg


class Progress:
    """Entries done, bytes, time left: a line that is written over on a terminal, else one every 30 seconds."""

    def __init__(self, stream: Any, label: str = "", now: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._now = stream, now
        self._label = f"{label}  " if label else ""
        self._started = self._told = now()
        self._line = ""

    def __call__(self, done: int, total: int, note: str = "", skipped: int = 0) -> None:
        """Args: skipped: of those done, how many took no time and say nothing about the rest."""
        now = self._now()
        timed = done - skipped
        left = (now - self._started) / timed * (total - done) if timed else 0.0
        self._line = (
            f"{self._label}{done}/{total} ({100 * done / max(total, 1):.1f} %)  {note}  "
            f"eta {datetime.timedelta(seconds=int(left))}"
        )
        terminal = self._stream.isatty()
        if now - self._told > (0.2 if terminal else 30):
            self._told = now
            print(
                f"\r{self._line}" if terminal else self._line, end="" if terminal else "\n", file=self._stream
            )
            self._stream.flush()

    def end(self) -> None:
        """The last line, whole."""
        if self._line:
            print(f"\r{self._line}" if self._stream.isatty() else self._line, file=self._stream, flush=True)


# ------------------------------------------------------------------------------------------------ info


def info(args: argparse.Namespace) -> int:
    """What is in a cache folder, space by space."""
    spaces = spaces_in(args.dir)
    rows = [_row(space) for space in spaces]
    if not spaces:
        _tell_empty(args.dir)
        return 0
    print(tabulate(rows, headers=["space", "entries", "on disk", "per entry", "shards", "last used"]))
    for space in spaces:
        print(f"\n{space.id}: {space.describe()}")
    free = shutil.disk_usage(args.dir).free
    print(
        f"\n{args.dir}: {gib(sum(space.bytes() for space in spaces))} in all; {gib(free)} are free on its disk."
    )
    return 0


def _tell_empty(folder: str) -> None:
    print(
        f"{folder} holds no features. MODEL.FROZEN.CACHE.DIR of a config says where they are; training or "
        "`python -m d2_frozen.cache build` fills it."
    )


def _row(space: Space) -> list[Any]:
    store = Store(space.folder)
    used = space.bytes()
    entries = f"{len(store)}" + (f" (+{store.duplicates} twice)" if store.duplicates else "")
    shards = len([path for path in shard_files(space.folder) if path.suffix == ".bin"])
    last = datetime.datetime.fromtimestamp(space.last_used()).strftime("%Y-%m-%d %H:%M")
    return [space.id, entries, gib(used), gib(used / len(store)) if len(store) else "", shards, last]


# ------------------------------------------------------------------------------------------------ verify


def verify(args: argparse.Namespace) -> int:
    """Read every entry and compare its checksum. With --repair, shards that hold damaged ones are deleted."""
    damaged: list[tuple[Space, str]] = []
    spaces = spaces_in(args.dir)
    if not spaces:
        _tell_empty(args.dir)
    for space in spaces:
        store = Store(space.folder)
        places = list(store.places())
        bad = []
        progress = Progress(sys.stdout, space.id)
        read = 0
        for count, (_, place) in enumerate(places, start=1):
            if store.read(place) is None:
                bad.append(place)
            read += place.length
            progress(count, len(places), gib(read))
        rows = store.unreadable_rows()
        shards = sorted({place.shard for place in bad} | set(rows))
        damaged += [(space, shard) for shard in shards]
        progress.end()
        print(f"{space.id}: {len(places)} entries, {gib(read)}, {len(bad)} damaged.")
        for place in bad:
            print(f"  damaged: {space.folder / place.shard}.bin, {place.length} bytes at {place.offset}")
        for shard, count in rows.items():
            print(
                f"  damaged: {space.folder / shard}.idx, the last {count} bytes (or they are being written now)"
            )
    if damaged and args.repair:
        for space, shard in damaged:
            freed = remove_shard(space.folder, shard)
            print(f"deleted {space.folder / shard}: {gib(freed)}; its entries will be computed again.")
        return 0
    if damaged:
        print(
            "Damaged entries are never used, but computed again. --repair deletes the shards that hold them."
        )
    return 1 if damaged else 0


# ------------------------------------------------------------------------------------------------ prune


def prune(args: argparse.Namespace) -> int:
    """Delete what is named, what was not used for long, and then the longest unused until the rest fits."""
    spaces = spaces_in(args.dir)
    unknown = sorted(set(args.space) - {space.id for space in spaces})
    if unknown:
        raise ValueError(
            f"no space {', '.join(unknown)} in {args.dir}; there are {', '.join(s.id for s in spaces)}."
        )
    if not (args.space or args.unused_days is not None or args.max_gb is not None):
        raise ValueError(
            "say what to delete: --space ID, --unused-days D, or --max-gb G (longest unused first)."
        )
    for flag, value in (("unused-days", args.unused_days), ("max-gb", args.max_gb)):
        if value is not None and not value >= 0:
            raise ValueError(f"--{flag} is {value}; it is 0 or more.")
    now = time.time()
    doomed = [
        space
        for space in spaces
        if space.id in args.space
        or (args.unused_days is not None and now - space.last_used() > args.unused_days * 86400)
    ]
    left = [space for space in spaces if space not in doomed]
    shards: list[tuple[Space, str, int]] = []
    if args.max_gb is not None:
        over = sum(space.bytes() for space in left) - int(args.max_gb * 2**30)
        # spaces_in gives the last used first. Of the last one that must give, only some shards go.
        for space in reversed(left):
            if over <= 0:
                break
            size = space.bytes()
            if size <= over:
                doomed.append(space)
                over -= size
            else:
                for shard, count in _oldest_shards(space):
                    if over <= 0:
                        break
                    shards.append((space, shard, count))
                    over -= count
    for space in doomed:
        print(
            f"{'delete' if args.yes else 'would delete'} {space.id}, {gib(space.bytes())}: {space.describe()}"
        )
    for space, shard, count in shards:
        print(f"{'delete' if args.yes else 'would delete'} {space.id}/{shard}, {gib(count)}")
    total = sum(space.bytes() for space in doomed) + sum(count for _, _, count in shards)
    if args.yes:
        for space in doomed:
            _remove_space(space)
        for space, shard, _ in shards:
            remove_shard(space.folder, shard)
        print(f"{gib(total)} freed.")
    else:
        print(f"{gib(total)} would be freed; --yes does it.")
    return 0


def _oldest_shards(space: Space) -> Iterator[tuple[str, int]]:
    by_shard: dict[str, list[Path]] = {}
    for path in shard_files(space.folder):
        by_shard.setdefault(path.stem, []).append(path)
    for shard, paths in sorted(by_shard.items(), key=lambda item: max(p.stat().st_mtime for p in item[1])):
        yield shard, sum(path.stat().st_size for path in paths)


def _remove_space(space: Space) -> None:
    """Only what the cache has made; a folder with anything else in it stays."""
    for shard in {path.stem for path in shard_files(space.folder)}:
        remove_shard(space.folder, shard)
    for path in [space.folder / "space.json", *space.folder.glob(".space.json.*.partial")]:
        path.unlink(missing_ok=True)
    try:
        space.folder.rmdir()
    except OSError as err:
        logger.warning("%s stays: %s", space.folder, err.strerror)


# ------------------------------------------------------------------------------------------------ flags


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="build|info|verify|prune")

    one = commands.add_parser("build", help="all views of all training images of a config")
    one.add_argument("--config-file", required=True)
    one.add_argument("--processes", type=int, default=1, help="at once, on one machine; GPUs are shared out")
    one.add_argument("--part", default="0/1", help="I/N: the I-th of N parts, from 0 (one per machine, say)")
    one.add_argument("--label", default="", help=argparse.SUPPRESS)
    one.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    one.set_defaults(run=build)

    one = commands.add_parser("info", help="entries, bytes, backbones")
    one.add_argument("dir")
    one.set_defaults(run=info)

    one = commands.add_parser("verify", help="read everything and compare checksums")
    one.add_argument("dir")
    one.add_argument("--repair", action="store_true", help="delete shards that hold damaged entries")
    one.set_defaults(run=verify)

    one = commands.add_parser("prune", help="delete what is not needed; says what first")
    one.add_argument("dir")
    one.add_argument("--unused-days", type=float, help="spaces that no run has opened for so long")
    one.add_argument("--max-gb", type=float, help="the longest unused, until the rest fits into so many GiB")
    one.add_argument("--space", action="append", default=[], help="this one, by its name in `info`")
    one.add_argument("--yes", action="store_true", help="delete, instead of saying what would be")
    one.set_defaults(run=prune)
    return parser


if __name__ == "__main__":
    sys.exit(main())
