"""Predict pictures and videos with any number of heads: one pass of the frozen backbone feeds them all.

python -m d2_frozen.predict --heads output/parts/model_final.pth street=output/street/model_final.pth \\
    photos/ film.mp4 --output predictions

A run that was stopped goes on when it is started again; docs/predict.md says what is written where.
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

from d2_frozen.claims import InUseError
from d2_frozen.cpus import fit_threads
from d2_frozen.engine.allocator import keep_freed_memory
from d2_frozen.prediction.inputs import find_items
from d2_frozen.prediction.outputs import OutputFolder
from d2_frozen.prediction.predictor import Predictor
from d2_frozen.prediction.run import BadInputError, OutputError, PredictionRun, Settings, Summary
from detectron2.utils.logger import setup_logger

__all__ = ["Predictor", "main"]

logger = logging.getLogger("d2_frozen.predict")


def main(arguments: Sequence[str] | None = None) -> Summary:
    """The command line; returns what was done.

    Raises:
        SystemExit: wrong flags.
        FileNotFoundError, ValueError, RuntimeError: see Predictor, find_items, OutputFolder, PredictionRun.
    """
    args = parse(arguments)
    setup_logger(name="d2_frozen")
    if not torch.cuda.is_available():
        keep_freed_memory()
        fit_threads()
    items = find_items(args.inputs, args.output)
    options = [part for line in args.options for part in line.split("=", 1)]
    predictor = Predictor(args.heads, args.config_files, device=args.device, size=args.size, options=options)
    logger.info("Heads:\n%s", predictor.describe())
    # Of an input that is finished, nothing is drawn again.
    drawn = {"pictures": args.pictures, "min_score": args.min_score if args.pictures else None}
    output = OutputFolder(
        Path(args.output), predictor.heads, {"size": args.size, **drawn}, overwrite=args.overwrite
    )
    on_gpu = any(head.cfg.MODEL.DEVICE.startswith("cuda") for head in predictor.heads)
    settings = Settings(
        batch=args.batch or (4 if on_gpu else 1),
        strict=args.strict,
        pictures=args.pictures,
        min_score=args.min_score,
        readers=args.readers,
    )
    there = sum(output.has(item) for item in items)
    logger.info("%d inputs, %d of them finished before.", len(items), there)
    start = time.perf_counter()
    before = signal.signal(signal.SIGTERM, _leave)
    run = PredictionRun(predictor, output, settings)
    try:
        return run(items)
    finally:
        signal.signal(signal.SIGTERM, before)
        _report(run.summary, predictor, Path(args.output), time.perf_counter() - start)


def _report(summary: Summary, predictor: Predictor, folder: Path, seconds: float) -> None:
    memory = predictor.memory
    lines = [
        f"{summary.inputs} inputs, {summary.pictures} images in {seconds:.1f} s "
        f"({summary.pictures / max(seconds, 1e-9):.2f} images/s)",
        f"backbones: {memory.passes} passes, {memory.reused} more answered from them",
        f"results:   {folder}",
    ]
    lines += [f"           {path}" for path in summary.collected]
    if summary.failed:
        lines.append(f"failed:    {len(summary.failed)}, listed with the cause in {folder / 'done.jsonl'}")
    logger.info("Done.\n%s", "\n".join(lines))


def _leave(number: int, frame: FrameType | None) -> None:
    logger.warning("%s: what is finished is kept; start again to go on.", signal.Signals(number).name)
    raise SystemExit(128 + number)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags; inputs may stand anywhere, also right behind the files of a flag."""
    parser = _parser()
    args = parser.parse_args(arguments)
    for flag, belongs in _LISTS.items():
        given = getattr(args, flag)
        count = next((i for i, text in enumerate(given) if not re.search(belongs, text)), len(given))
        setattr(args, flag, given[:count])
        args.inputs += given[count:]
    if not args.heads:
        files = [path for folder in args.inputs for path in Path(folder).glob("model_final.pth")]
        hint = f" Do you mean {files[0]}?" if files else ""
        parser.error(f"--heads: no checkpoint (.pth, .pkl, .safetensors) behind it.{hint}")
    if not args.inputs:
        parser.error("no inputs: give pictures, videos, or folders of them.")
    for flag, least in (("batch", 0), ("readers", 1)):
        if getattr(args, flag) < least:
            parser.error(f"--{flag} is {getattr(args, flag)}; it must be {least} or more.")
    return args


# What may stand behind a flag that takes several; the first that looks otherwise is an input.
_LISTS = {
    "heads": r"\.(pth|pkl|safetensors|pyth)(\?.*)?$",
    "config_files": r"\.ya?ml$",
    "options": r"^[A-Z][A-Z0-9_.]*=",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="pictures, videos, or folders of them")
    parser.add_argument(
        "--heads",
        nargs="+",
        required=True,
        action="extend",
        metavar="FILE",
        help="checkpoints, each FILE or NAME=FILE",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--config-files",
        nargs="+",
        default=[],
        metavar="YAML",
        help="one per head; by default what the checkpoint holds, else config.yaml beside it",
    )
    parser.add_argument(
        "--size",
        type=int,
        help="long side in pixels at which every head sees pictures; by default each its own test size",
    )
    parser.add_argument(
        "--batch", type=int, default=0, help="images of one size at a time (default: 4 on a GPU, else 1)"
    )
    parser.add_argument(
        "--min-score", type=float, default=0.5, help="of what is drawn; files hold everything"
    )
    parser.add_argument(
        "--no-pictures", dest="pictures", action="store_false", help="write no annotated pictures"
    )
    parser.add_argument("--strict", action="store_true", help="stop at the first input that fails")
    parser.add_argument(
        "--overwrite", action="store_true", help="remove earlier results in the folder, begin anew"
    )
    parser.add_argument(
        "--device",
        help="cpu, cuda, cuda:1 (default: that of the head's config where it is there, else a GPU, else the CPU)",
    )
    parser.add_argument("--readers", type=int, default=2, help="threads that decode pictures")
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="KEY=VALUE", help="config options, for every head"
    )
    return parser


def console_main() -> None:
    """Exit code 0; 1 where inputs failed or the run could not start; 130 after Ctrl-C."""
    try:
        summary = main()
    except (BadInputError, OutputError, InUseError, OSError, ValueError) as err:
        print(f"error: {err}", file=sys.stderr)
        raise SystemExit(1) from err
    except KeyboardInterrupt:
        print("stopped: what is finished is kept; start again to go on.", file=sys.stderr)
        raise SystemExit(130) from None
    raise SystemExit(1 if summary.failed else 0)


if __name__ == "__main__":
    console_main()
