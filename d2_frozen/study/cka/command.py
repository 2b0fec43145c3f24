"""``study cka``: models and images by config -> similarities of feature maps as json, npz and a heatmap.

python -m d2_frozen.study cka bifpn --run output/quickstart_detection
python -m d2_frozen.study cka backbone --run output/frozen --other-run output/full
python -m d2_frozen.study cka --x 'backbone[p*]' --y 'roi_heads.box_head.fc*' --run output/quickstart_detection
python -m d2_frozen.study cka --list --run output/quickstart_detection
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from d2_frozen.study.cka.presets import PRESETS, Comparison, of_globs
from d2_frozen.study.jobs import read_json

logger = logging.getLogger("d2_frozen.study")

# Exit code of a shell for a process that Ctrl-C ended.
_INTERRUPTED = 130
# Wider tables are not printed.
_MOST_COLUMNS = 12


def add_cka_command(commands: Any) -> None:
    """Add ``cka`` to the subcommands of ``study``."""
    parser = commands.add_parser(
        "cka",
        help="similarity of feature maps of trained models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="presets:\n" + "\n".join(f"  {name:20s} {preset.about}" for name, preset in PRESETS.items()),
    )
    parser.add_argument("preset", nargs="?", choices=sorted(PRESETS), help="what to compare; or --x and --y")
    parser.add_argument("--x", default="", metavar="GLOB", help="feature maps by name (rows); * and ? work")
    parser.add_argument("--y", default="", metavar="GLOB", help="feature maps by name (columns)")
    parser.add_argument("--list", action="store_true", help="print the names of all feature maps of --run")
    for prefix, which in (("", "the model"), ("other-", "the second model, whose maps are the columns")):
        parser.add_argument(
            f"--{prefix}run",
            dest=f"folder_of_{prefix or 'first'}".rstrip("-"),  # "run" is what the command calls
            default="",
            metavar="DIR",
            help=f"{which}: OUTPUT_DIR of a training",
        )
        parser.add_argument(f"--{prefix}config-file", default="", metavar="YAML", help="or a config")
        parser.add_argument(
            f"--{prefix}options",
            nargs="*",
            default=[],
            metavar="KEY VALUE",
            help="over it, e.g. MODEL.WEIGHTS FILE",
        )
    parser.add_argument(
        "--split", choices=("test", "train"), default="test", help="images of DATASETS.TEST or TRAIN"
    )
    parser.add_argument(
        "--images", type=int, default=0, metavar="N", help="images or clips; default: all, up to 512"
    )
    parser.add_argument("--batch", type=int, default=16, metavar="n", help="examples per batch, at least 4")
    parser.add_argument("--rois", type=int, default=32, metavar="N", help="at most so many RoIs of an image")
    parser.add_argument(
        "--size", type=int, default=0, metavar="PX", help="side of the square images; default: as trained"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the order of images, and of the RoIs")
    parser.add_argument("--output", default="", metavar="DIR", help="default: RUN/cka, or output/study/cka")
    parser.add_argument(
        "--name",
        default="",
        help="of the files; default: of the preset or globs, and of config, options and a second model",
    )
    parser.set_defaults(run=run_cka)


def run_cka(args: argparse.Namespace) -> int:
    """
    Returns:
        The exit code: 2 for a model that cannot be built, 130 after an interruption.
    Raises:
        ValueError, FileNotFoundError: wrong arguments, configs, data or names.
    """
    from d2_frozen.engine import CheckpointMismatchError

    comparison, sources = _what_is_asked(args)
    # Which prints the whole model.
    logging.getLogger("detectron2.engine.defaults").setLevel(logging.WARNING)
    try:
        models = [source.open(args.split) for source in sources]
    except (CheckpointMismatchError, KeyError, AssertionError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    return _list(args, models[0]) if comparison is None else _compare(args, comparison, models)


def _what_is_asked(args: argparse.Namespace) -> tuple[Comparison | None, list[Any]]:
    from d2_frozen.study.cka.inputs import ModelSource

    globs = bool(args.x) + bool(args.y)
    if not args.list and (bool(args.preset) + bool(globs) != 1 or globs == 1):
        raise ValueError("say what to compare: a preset, or both --x and --y; or --list.")
    sources = [ModelSource(args.folder_of_first, args.config_file, tuple(args.options))]
    two = bool(args.folder_of_other or args.other_config_file)
    if args.other_options and not two:
        raise ValueError(
            "--other-options are of a second model: give --other-run or --other-config-file too."
        )
    for flag in ("images", "size", "seed"):
        if (number := getattr(args, flag)) < 0:
            raise ValueError(f"--{flag} {number} is below 0.")
    if two:
        sources.append(ModelSource(args.folder_of_other, args.other_config_file, tuple(args.other_options)))
    if args.list:
        return None, sources[:1]
    if not args.preset:
        return of_globs(args.x, args.y), sources
    preset = PRESETS[args.preset]
    if preset.two_models and not two:
        raise ValueError(
            f"{args.preset} compares two models: give the second as --other-run or --other-config-file."
        )
    return preset.comparison(), sources


def _list(args: argparse.Namespace, model: Any) -> int:
    from d2_frozen.study.cka.collect import GramCollector
    from d2_frozen.study.cka.inputs import first_samples

    batch = first_samples(model.cfg, args.batch, args.size, args.seed)
    with GramCollector(model.network, lambda _: False) as collector:
        collector.grams(batch)
    rows = [(name, "x".join(map(str, shape)), example) for name, (shape, example) in collector.seen.items()]
    print(tabulate(rows, headers=["feature map", f"shape, batch of {len(batch)}", "an example is one"]))
    return 0


def _compare(args: argparse.Namespace, comparison: Comparison, models: list[Any]) -> int:
    from d2_frozen.benchmarks.measuring import machine_facts, source_commit
    from d2_frozen.study.cka.inputs import Batches, check_same_input
    from d2_frozen.study.cka.measure import measure

    source_commit()  # now, not of the tree as it is in the end
    if args.rois < 1:
        raise ValueError(f"--rois {args.rois}: give at least 1 RoI per image.")
    if len(models) > 1:
        check_same_input(models[0].cfg, models[1].cfg)
    batches = Batches(models[0].cfg, args.images, args.batch, args.size, args.seed)
    things = "clips" if "VIDEO" in models[0].cfg else "images"
    sets = ", ".join(models[0].cfg.DATASETS.TEST)
    logger.info("%d %s of %s in %d batches of %d", batches.images, things, sets, len(batches), args.batch)
    result = measure([model.network for model in models], comparison, batches, args.rois, args.seed)
    if result is None:
        print("interrupted before the first batch was done; nothing written", file=sys.stderr)
        return _INTERRUPTED
    folder = Path(
        args.output or (Path(args.folder_of_first, "cka") if args.folder_of_first else "output/study/cka")
    )
    name, complete = args.name or _default_name(args), result.batches == len(batches)
    if not complete and (read_json(folder / f"{name}.json") or {}).get("complete"):
        print(f"{folder / name}.json is of all its batches and stays as it is", file=sys.stderr)
        name = f"{name}_incomplete"
    about = {
        things: result.examples,
        "batch": args.batch,
        "side_px": batches.side if things == "images" else models[0].cfg.VIDEO.CROP_SIZE,
        "rois_per_image": args.rois,
        "seed": args.seed,
        "complete": complete,
        "datasets": list(models[0].cfg.DATASETS.TEST),
        "models": [model.about() for model in models],
        **machine_facts(),
    }
    for panel in result.panels:
        _print(panel)
    names = " and ".join(model.cfg.OUTPUT_DIR for model in models)
    caption = f"{names}: linear CKA, {result.examples} {things} in batches of {args.batch}"
    if not complete:
        caption += f", interrupted after {result.batches} of {len(batches)}"
    files = result.write(folder, name, about, caption)
    print("written: " + ", ".join(str(file) for file in files))
    if not complete:
        print(f"interrupted: {result.batches} of {len(batches)} batches", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _default_name(args: argparse.Namespace) -> str:
    """Another one for other maps and other models. A run without options is told by its folder."""
    name = args.preset or f"globs_{_short(f'{args.x} and {args.y}')}"
    if first := [*([] if args.folder_of_first else [args.config_file]), *args.options]:
        name += f"_of_{_short(' '.join(first))}"
    if other := args.folder_of_other or args.other_config_file:
        name += f"_and_{_short(' '.join([str(Path(other)), *args.other_options]))}"
    return name


def _short(text: str) -> str:
    """Its end as part of a file name, and a few digits that tell texts apart which look the same in one."""
    readable = re.sub(r"[^\w.-]+", "_", text, flags=re.ASCII)[-40:].strip("_.")
    return f"{readable}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _print(panel: Any) -> None:
    print(f"\n{panel.title}" + ("" if np.isnan(panel.mean) else f"; mean {panel.mean:.3f}"))
    if len(panel.columns) <= _MOST_COLUMNS:
        rows = [
            [label, *(_cell(value, error) for value, error in zip(values, errors))]
            for label, values, errors in zip(panel.rows, panel.cka, panel.standard_error)
        ]
        print(tabulate(rows, headers=["", *panel.columns], tablefmt="github", disable_numparse=True))


def _cell(value: float, error: float) -> str:
    if np.isnan(value):
        return "–"
    return f"{value:.3f}" + ("" if np.isnan(error) else f" ± {error:.3f}")
