"""Train several heads in one run, on one frozen backbone: each as if it were trained alone.

python -m d2_frozen.joint --config-files parts.yaml street.yaml --output output/joint [KEY VALUE ...]

Each head's folder (DIR/NAME of its yaml, or its own OUTPUT_DIR without --output) holds what train_net would write.
KEY VALUE options are for every head; docs/predict.md says what is shared.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2_frozen import tasks, train_net
from d2_frozen.cpus import fit_threads
from d2_frozen.data.own_names import OwnNames
from d2_frozen.engine.allocator import keep_freed_memory
from d2_frozen.engine.joint import HeadLogs, JointHead, JointTraining, speaking
from d2_frozen.prediction.heads import backbone_settings, distinct_names
from d2_frozen.processes import run_processes
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

logger = logging.getLogger("d2_frozen.joint")


def main(args: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """One process of the run; head name -> metrics, None for heads without evaluation.

    Raises:
        ValueError: two heads with one OUTPUT_DIR, or with two FLOAT32_PRECISIONs, and everything that
            ``train_net.setup`` raises for one of them.
    """
    with contextlib.ExitStack() as claims:
        return _train(build_heads(args, claims))


def _train(heads: list[JointHead]) -> dict[str, dict[str, Any] | None]:
    joint = JointTraining(heads)
    results: dict[str, dict[str, Any] | None] = joint()
    memory = joint.memory
    if memory.passes:
        logger.info("Backbones: %d passes, %d more answered from them.", memory.passes, memory.reused)
    complete = [head for head in heads if head.name not in results]
    for head in heads:
        with head.names.active(), speaking(head.name):
            cfg, model = head.trainer.cfg, head.trainer.model
            if head in complete:
                results[head.name] = train_net.evaluate_complete(head.trainer)
            train_net.finish(cfg, model, results[head.name])
    for head in complete:
        train_net.verify(head.trainer.cfg, results[head.name])
    return results


def build_heads(args: argparse.Namespace, claims: contextlib.ExitStack | None = None) -> list[JointHead]:
    """Trainers, each built as ``train_net`` does, right after its seed was set; ``claims``: see ``train_net.setup``."""
    logs = HeadLogs()
    heads: list[JointHead] = []
    _check_precisions(args)
    folders: dict[str, str] = {}
    names = distinct_names([Path(file).stem for file in args.config_files])
    for name, file in zip(names, args.config_files):
        options = list(args.opts)
        if args.output:
            options += ["OUTPUT_DIR", os.path.join(args.output, name)]
        output_dir = tasks.read_config(file, options).OUTPUT_DIR
        folder = os.path.realpath(output_dir)
        if folder in folders:
            raise ValueError(
                f"{folders[folder]} and {file} have one OUTPUT_DIR, {folder}. Give --output, or a folder for each."
            )
        folders[folder] = file
        own = OwnNames()
        with own.active(), speaking(name):
            # As setup will call it, which then adds no further lines to the terminal.
            setup_logger(output_dir, distributed_rank=comm.get_rank(), name="d2_frozen")
            setup_logger(output_dir, distributed_rank=comm.get_rank(), name="fvcore")
            setup_logger(output_dir, distributed_rank=comm.get_rank())
            logs.take(name)
            flags = Namespace(**{**vars(args), "config_file": file, "opts": options, "eval_only": False})
            cfg = train_net.setup(flags, claims)
            if cfg.MODEL.DEVICE == "cpu":
                keep_freed_memory()
                fit_threads()
            trainer = tasks.task_of(cfg).trainer()(cfg)
            trainer.resume_or_load(resume=args.resume)
        heads.append(JointHead(name, trainer, own, backbone_settings(cfg)))
    return heads


def _check_precisions(args: argparse.Namespace) -> None:
    """FLOAT32_PRECISION is a setting of the process: that of the last head would be everybody's."""
    files: dict[str, str] = {}
    for file in args.config_files:
        files.setdefault(tasks.read_config(file, args.opts).get("FLOAT32_PRECISION", ""), file)
    if len(files) > 1:
        seen = ", ".join(f"{precision!r} in {file}" for precision, file in files.items())
        raise ValueError(
            f"FLOAT32_PRECISION is {seen}; heads that train together have one. Give it behind the files, for all: "
            "FLOAT32_PRECISION high, say."
        )


def argument_parser() -> argparse.ArgumentParser:
    """Flags; those of train_net have its meaning."""
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.joint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-files", nargs="+", required=True, metavar="YAML", help="one per head")
    parser.add_argument("--output", default="", metavar="DIR", help="OUTPUT_DIR of a head is then DIR/NAME")
    parser.add_argument("--resume", action="store_true", help="each head from its last checkpoint")
    parser.add_argument("--num-gpus", type=int, default=1, help="per machine")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--dist-url", default="auto")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options for all heads: KEY VALUE ...")
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags; KEY VALUE options may follow the files directly."""
    parser = argument_parser()
    args = parser.parse_args(arguments)
    files = [i for i, text in enumerate(args.config_files) if not text.endswith((".yaml", ".yml"))]
    if files:
        args.opts = args.config_files[files[0] :] + args.opts
        args.config_files = args.config_files[: files[0]]
    if not args.config_files:
        parser.error(f"--config-files: {args.opts[0]!r} is no .yaml file, and options come behind the files.")
    return args


def console_main() -> None:
    """Entry point of ``python -m d2_frozen.joint``."""
    run_processes(main, parse())


if __name__ == "__main__":
    console_main()
