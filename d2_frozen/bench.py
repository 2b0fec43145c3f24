"""Seconds and peak memory, two subjects taking turns in one run.

Frozen against full fine-tuning, by phase:
    python -m d2_frozen.bench --config-file configs/quickstart/detection.yaml [--json FILE] [KEY VALUE ...]
The embedded engine against Detectron2 (which must be importable):
    python -m d2_frozen.bench --vs-detectron2 [--size 320] [--batch 2] [--json FILE] [KEY VALUE ...]
Another comparison by its name (--help after the name shows its options):
    python -m d2_frozen.bench {comparisons} ...

A and B take turns, so that a noisy machine disturbs both alike; the figures are medians, and what counts is their
ratio. Peak memory is taken in a process of its own each.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from typing import Any

from d2_frozen.benchmarks import engines, freezing
from d2_frozen.benchmarks.arguments import one_of, parse_with_lists
from d2_frozen.benchmarks.measuring import source_commit, write_json

# Comparison -> its module, imported only when it is asked for, as some are an app's. The module has a function
# main(arguments: list of str) -> dict: it reads its own options, prints tables and returns what --json writes.
COMPARISONS = {
    "accuracy": "d2_frozen.benchmarks.accuracy",
    "cache": "d2_frozen.benchmarks.caching",
    "forward": "d2_frozen.benchmarks.forward",
    "loader": "d2_frozen.benchmarks.loader",
    "step": "d2_frozen.benchmarks.step",
    "one_pass": "d2_frozen.benchmarks.one_pass",
    "reading": "d2_frozen.benchmarks.reading",
    "deformable": "seg_app.benchmarks.deformable",
    "mask2former": "seg_app.benchmarks.mask2former",
    "video": "video_app.benchmarks.video",
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns what is also written with ``--json``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING)
    source_commit()  # of the code that is loaded now; at the end of a long run it may be another
    if arguments and arguments[0] in COMPARISONS:
        return importlib.import_module(COMPARISONS[arguments[0]]).main(arguments[1:])
    args = parse_with_lists(_parser(), arguments, sections=one_of(engines.SECTIONS))
    if args.vs_detectron2:
        settings = {
            "config": args.config_file or engines.DEFAULT_CONFIG,
            "options": args.opts,
            "size": args.size,
            "batch": args.batch,
            "images": args.images,
            "cpu_time": args.cpu_time,
        }
        result = engines.compare(settings, args.rounds, args.warmup, args.sections)
        print(engines.report(result))
    else:
        config_file = args.config_file or freezing.DEFAULT_CONFIG
        if args.memory_of:
            freezing.print_memory(config_file, args.opts, args.memory_of, args.rounds)
            return {}
        result = freezing.compare(config_file, args.opts, args.rounds, args.warmup, args.cpu_time)
        print(freezing.report(result))
    write_json(result, args.json)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.bench",
        description=(__doc__ or "").format(comparisons="|".join(COMPARISONS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vs-detectron2", action="store_true", help="compare the two engines")
    parser.add_argument(
        "--config-file",
        help=f"default: {freezing.DEFAULT_CONFIG}, with --vs-detectron2 {engines.DEFAULT_CONFIG}",
    )
    parser.add_argument("--rounds", type=int, default=10, help="measured steps of each")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each before measuring")
    parser.add_argument(
        "--size", type=int, default=320, help="side of the images in pixels (--vs-detectron2)"
    )
    parser.add_argument("--batch", type=int, default=2, help="images per training step (--vs-detectron2)")
    parser.add_argument("--images", type=int, default=50, help="images per evaluation (--vs-detectron2)")
    parser.add_argument(
        "--sections",
        nargs="+",
        default=engines.SECTIONS,
        help=f"of --vs-detectron2: {', '.join(engines.SECTIONS)}",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count CPU seconds instead of the clock: steadier on a shared machine; use one thread",
    )
    parser.add_argument("--json", help="also write the result to this file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


if __name__ == "__main__":
    main()
