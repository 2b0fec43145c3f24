"""The paper's experiments as commands.

    python -m d2_frozen.study table 2 --scale mini --seeds 3 --parallel 2
    python -m d2_frozen.study table 6 --scale mini --cells percent_1_frozen percent_1_full
    python -m d2_frozen.study sweep bifpn_layers --scale mini --seeds 3
    python -m d2_frozen.study pretrain --kind contrastive
    python -m d2_frozen.study cka bifpn --run output/quickstart_detection
    python -m d2_frozen.study findings --scale mini
    python -m d2_frozen.study report --scale mini

The same command goes on where it was stopped; ``--dry-run`` says what it would do.
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tabulate import tabulate

from d2_frozen.files import whole_file
from d2_frozen.study.cka.command import add_cka_command
from d2_frozen.study.findings import write_findings
from d2_frozen.study.jobs import Job, compared_options, read_json
from d2_frozen.study.layout import write_sweep, write_table
from d2_frozen.study.paper import paper_numbers
from d2_frozen.study.pretraining import (
    ITERATIONS,
    KINDS,
    SIZES,
    Machine,
    Pretraining,
    check_pretrained,
    pretrain,
    shipped,
)
from d2_frozen.study.probe import Estimate, count_up, disk_free_mib, probe, probe_synthetic
from d2_frozen.study.queue import LocalQueue
from d2_frozen.study.report import write_report
from d2_frozen.study.slurm import SlurmQueue
from d2_frozen.study.sweeps import SWEEPS, points_of
from d2_frozen.study.tables import TITLES, cells_of, named_cells

logger = logging.getLogger("d2_frozen.study")

# What the mini scale trains on, by task: commands that generate it, and do nothing where it is complete.
_WORLDS = {
    "detection": ("d2_frozen.data.shapes", "--output", "datasets/shapes"),
    "segmentation": ("d2_frozen.data.shapes", "--output", "datasets/shapes"),
    "video": ("video_app.moving_shapes", "--output", "datasets/moving_shapes", "--train", "1500"),
}
# Where configs/mini look for backbones.
_PRETRAINED = Path("output/study/pretrained")


def main(arguments: list[str] | None = None) -> int:
    """Command line.

    Returns:
        The exit code: 1 if a job has not finished, 2 for what cannot be asked.
    """
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        return args.run(args)
    except (FileNotFoundError, ValueError, ImportError, yaml.YAMLError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2


def run_table(args: argparse.Namespace) -> int:
    """``table``: run what has not finished of a table, then write the table of what has."""
    cells = cells_of(args.number, args.scale, args.configs, args.cells)
    numbers = paper_numbers(args.configs)  # now, so that a bad line in it is said before anything runs
    groups = [cell.jobs(range(1, args.seeds + 1), args.options) for cell in cells]
    left = _run(args, groups, {cell.task for cell in cells})
    if left is None:
        return 0
    root = _root(args)
    seeds = _seeds(args, f"table{args.number}/*/*")
    all_cells = named_cells(args.number, args.scale, args.configs)
    options = {cell.task: args.options for cell in cells}
    for task in {cell.task for cell in all_cells} - options.keys():
        options[task] = _options_of(root / f"table{args.number}" / task)
    finished = {
        cell: runs
        for cell in all_cells
        if (runs := _finished(cell.jobs(seeds, options[cell.task]), root)) or cell in cells
    }
    return _report(write_table(finished, args.number, root, numbers), left, root)


def run_sweep(args: argparse.Namespace) -> int:
    """``sweep``: run what has not finished of a sweep, then write its table and curve."""
    sweep = SWEEPS[args.name]
    points = points_of(
        args.name, args.scale, args.configs, range(1, args.seeds + 1), args.values, args.options
    )
    groups, wanted = [point.jobs for point in points], {point.label for point in points}
    left = _run(args, groups, {point.cell.task for point in points}, sweep.key)
    if left is None:
        return 0
    root = _root(args)
    seeds = _seeds(args, f"sweep/{args.name}/*" if sweep.key else f"table{sweep.table}/{sweep.task}/*")
    # Other values, which an earlier call has run, belong to the curve too.
    found = (path.name for path in (root / "sweep" / args.name).glob("*"))
    earlier = {int(name) for name in found if name.isdecimal()}
    values = sorted({int(label) for label in wanted} | earlier) if sweep.key else []
    finished = [
        (point, runs)
        for point in points_of(args.name, args.scale, args.configs, seeds, values, args.options)
        if (runs := _finished(point.jobs, root)) or point.label in wanted
    ]
    return _report(write_sweep(args.name, sweep.title, finished, root), left, root)


def run_pretrain(args: argparse.Namespace) -> int:
    """``pretrain``: one of the small backbones of Tables 1 and 5."""
    what = Pretraining(args.kind, args.size, args.images, args.iterations, args.seed)
    path = pretrain(what, args.output, Machine(args.device, args.workers, args.amp, args.compile))
    print(f"MODEL.TIMM.PRETRAINED {path}")
    return 0


def run_findings(args: argparse.Namespace) -> int:
    """``findings``: which findings of the paper hold in what has run."""
    path = write_findings(_root(args), args.scale)
    print(path.read_text(encoding="utf-8"))
    print(f"written to {path}")
    return 0


def run_report(args: argparse.Namespace) -> int:
    """``report``: one page of what lies in the folder of the study."""
    print(f"written to {write_report(_root(args), args.scale)}, and report.md beside it")
    return 0


def _run(
    args: argparse.Namespace, groups: Sequence[Sequence[Job]], tasks: set[str], swept: str = ""
) -> list[Job] | None:
    """Run the groups seed by seed, so that an early table has a value in every cell.

    Args:
        swept: config key that is not the options' to set.
    Returns:
        The jobs that have not finished; None with --dry-run.
    """
    _check_flags(args, swept)
    _check_configs([group[0] for group in groups])
    root = _root(args)
    jobs = [job for of_seed in zip(*groups) for job in of_seed]
    left = [job for job in jobs if job.result(root) is None]
    settings = dict(_setting(text) for text in args.slurm or ())
    if args.dry_run:
        if args.scale == "mini" and left and not (args.no_probe or args.probe_synthetic):
            _generate(tasks)
        print(_plan(args, jobs, left, len(groups)))
        return None
    # What can be wrong is said before the hours of pretraining.
    queue: LocalQueue | SlurmQueue
    if args.slurm is None:
        queue = LocalQueue(root, args.parallel, args.threads, args.gpus, args.num_gpus)
    else:
        queue = SlurmQueue(root, args.parallel, args.threads, args.num_gpus, settings)
    _check_backbones(left, args.pretraining_iterations)
    if args.scale == "mini" and left:
        _generate(tasks)
    _provide_backbones(left, args.pretraining_iterations, args.slurm is not None)
    logger.info("%d of %d jobs have finished.", len(jobs) - len(left), len(jobs))
    return queue.run(left)


def _check_flags(args: argparse.Namespace, swept: str) -> None:
    if not args.dry_run and (args.no_probe or args.probe_synthetic):
        raise ValueError(
            "--no-probe and --probe-synthetic say how to make the plan of --dry-run: add that, or leave them out."
        )
    for flag, least in (
        ("seeds", 1),
        ("parallel", 1),
        ("threads", 0),
        ("num_gpus", 0),
        ("pretraining_iterations", 1),
    ):
        if (number := getattr(args, flag)) < least:
            raise ValueError(f"--{flag.replace('_', '-')} {number}: give at least {least}.")
    if args.gpus and args.slurm is not None:
        raise ValueError(
            "--gpus shares the GPUs of this machine; from Slurm, --num-gpus N asks for N for each run (gpus_per_node)."
        )
    if args.gpus and len(args.gpus) < args.num_gpus:
        raise ValueError(
            f"--gpus names {len(args.gpus)} GPUs, and --num-gpus wants {args.num_gpus} for each run."
        )
    said_by = {"SEED": "--seeds", "OUTPUT_DIR": "--output", swept: "--values"}
    for key in args.options[::2]:
        if key in said_by:
            raise ValueError(f"--options {key}: {said_by[key]} says that. Leave the key out.")


def _check_configs(jobs: Sequence[Job]) -> None:
    """One that cannot be read is a failed cell, and the others run; none that can is a mistake in the options."""
    errors = []
    for job in jobs:
        try:
            job.config()
            return
        except (ValueError, FileNotFoundError) as err:
            errors.append(err)
    if errors:
        raise errors[0]


def _generate(tasks: set[str]) -> None:
    """The data of the mini scale; nothing to do where it is complete."""
    for command in {_WORLDS[task] for task in tasks}:
        subprocess.run([sys.executable, "-m", *command], check=True)


def _small_backbone(job: Job) -> Path | None:
    """The file that this job needs, if it is one of the small backbones of the mini scale."""
    try:
        path = Path(job.config().MODEL.TIMM.PRETRAINED)
    except (ValueError, FileNotFoundError):  # the job itself fails with that
        return None
    return path if path.parent == _PRETRAINED else None


def _missing_backbone(job: Job) -> Path | None:
    path = _small_backbone(job)
    return None if path is None or path.exists() else path


def _check_backbones(jobs: Sequence[Job], iterations: int) -> None:
    """ValueError if one that is there is of another pretraining than the tables compare."""
    for path in sorted({path for job in jobs if (path := _small_backbone(job)) and path.exists()}):
        try:
            what = Pretraining.of_name(path.stem, iterations=iterations)
        except ValueError:  # a file of the user's own
            continue
        check_pretrained(what, path)


def _provide_backbones(jobs: Sequence[Job], iterations: int, on_cluster: bool) -> None:
    """Those that are missing: copied where they come with the package, or pretrained."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left: list[Pretraining] = []
    for path in sorted({path for job in jobs if (path := _missing_backbone(job))}):
        what = Pretraining.of_name(path.stem, iterations=iterations)
        ready = shipped(what)
        if ready is None:
            left.append(what)
        else:
            logger.info("%s is missing; it comes with the package.", path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as partial:
                shutil.copyfile(ready, partial)
    if left and on_cluster:
        logger.warning(
            "Before anything is submitted, %s %s pretrained here, in this process, on %s: hours without a GPU. "
            "To do that elsewhere first: study pretrain --kind ... --size ... --images ...",
            ", ".join(what.name for what in left),
            "is" if len(left) == 1 else "are",
            device,
        )
    for what in left:
        path = _PRETRAINED / f"{what.name}.safetensors"
        logger.info("%s is missing; pretraining it.", path)
        try:
            pretrain(what, _PRETRAINED, Machine(device))
        except (ImportError, FloatingPointError, ValueError) as err:  # its cells fail, the others go on
            logger.error("%s is not there: %s", path, err)


def _root(args: argparse.Namespace) -> Path:
    return Path(args.output) / args.scale


def _seeds(args: argparse.Namespace, models: str) -> list[int]:
    """Those asked for, and those that earlier calls have run of these models (glob of folders)."""
    found = (path.name.removeprefix("seed") for path in _root(args).glob(f"{models}/seed*"))
    return sorted({*range(1, args.seeds + 1), *(int(number) for number in found if number.isdecimal())})


def _options_of(folder: Path) -> Sequence[str]:
    """Those of the runs of a task that this call was not about; none, and a warning, where they had different ones."""
    results = (read_json(path) for path in sorted(folder.glob("*/seed*/result.json")))
    found = {compared_options(result) for result in results if result}
    if len(found) > 1:
        logger.warning("%s has runs with different --options; those without any are in the table.", folder)
    return next(iter(found)) if len(found) == 1 else ()


def _finished(jobs: Iterable[Job], root: Path) -> list[dict[str, Any]]:
    """Results of those that have finished; earlier calls may have run them with other options, which is said."""
    results = []
    for job in jobs:
        try:
            result = job.result(root)
        except (ValueError, FileNotFoundError) as err:
            logger.warning("left out: %s", err)
            continue
        if result is not None:
            results.append(result)
    return results


def _report(path: Path, left: Sequence[Job], root: Path) -> int:
    print(path.read_text(encoding="utf-8"))
    print(f"written to {path}; .csv and .png lie beside it")
    for job in left:
        failure = job.failure(root)
        print(f"{job.name}: {failure['error'] if failure else 'not finished'}", file=sys.stderr)
    return 1 if left else 0


def _plan(args: argparse.Namespace, jobs: Sequence[Job], left: Sequence[Job], models: int) -> str:
    """What would run. Each model that has not finished with all seeds is probed once: with the first seed."""
    root = _root(args)
    states = ["finished" if job not in left else "failed" if job.failure(root) else "to do" for job in jobs]
    # The first seed of each model that something is left of; what is only evaluated trains nothing.
    training = [
        index
        for index in range(models)
        if jobs[index].evaluates is None and set(states[index::models]) != {"finished"}
    ]
    first = [jobs[index] for index in training]
    missing = {job.name: path for job in first if (path := _missing_backbone(job))}
    # Random weights take as long.
    first = [
        replace(job, options=(*job.options, "MODEL.TIMM.PRETRAINED", "")) if job.name in missing else job
        for job in first
    ]
    if args.no_probe:
        found = count_up(first)
    elif args.probe_synthetic:
        found = probe_synthetic(first, args.threads, args.num_gpus, args.gpus)
    else:
        found = probe(first, args.threads, args.num_gpus, args.gpus)
    estimates = dict(zip(training, found))
    failed = {jobs[index].name: found for index, found in estimates.items() if isinstance(found, str)}
    rows: list[list[Any]] = []
    hours = disk = 0.0
    unknown = 0
    for index, (job, state) in enumerate(zip(jobs, states)):
        estimate = estimates.get(index % models, "evaluates another job" if job.evaluates else "")
        if isinstance(estimate, Estimate):
            rows.append([job.name, state, *_planned(estimate), job.config_file])
            if state != "finished":
                hours, disk = hours + estimate.hours, disk + estimate.disk_mib
        else:
            rows.append([job.name, state, "", "", "", estimate[:60], "", "", job.config_file])
            unknown += state != "finished" and index % models in estimates
    headers = ["job", "state", "trainable", "iterations", "s each", "training", "memory", "disk", "config"]
    free = disk_free_mib(root)
    lines = [tabulate(rows, headers=headers, disable_numparse=True)]
    lines += [f"error: {name}: {error}" for name, error in failed.items()]
    if not args.no_probe:
        lines.append(
            f"To do: {hours:.1f} h of training without evaluations, {hours / args.parallel:.1f} h with "
            f"{args.parallel} at a time."
        )
    lines.append(f"To do: {disk / 1024:.1f} GiB of checkpoints; {free / 1024:.1f} GiB of the disk are free.")
    if unknown:
        lines.append(f"Without {unknown} of {len(left)} jobs to do, which could not be estimated.")
    if args.probe_synthetic:
        lines.append(
            "Measured on a generated batch in memory, for one GPU of each run: without reading data and without what "
            "GPUs send each other."
        )
    names = sorted({path.stem for path in missing.values()})
    names = [n for n in names if not shipped(Pretraining.of_name(n, iterations=args.pretraining_iterations))]
    if names:
        lines.append(f"Before that, these backbones are pretrained: {', '.join(names)}.")
    if disk > free:
        lines.append(
            "The disk is too small: keep fewer checkpoints (--options SOLVER.CHECKPOINTS_KEPT 1), or choose another "
            "--output."
        )
    return "\n".join(lines)


def _planned(estimate: Estimate) -> list[str]:
    return [
        f"{estimate.trainable / 1e6:.2f} M",
        str(estimate.iterations),
        *(
            "" if math.isnan(value) else text
            for value, text in (
                (estimate.seconds_per_iteration, f"{estimate.seconds_per_iteration:.3f}"),
                (estimate.hours, f"{estimate.hours:.2f} h"),
                (estimate.peak_memory_mib, f"{estimate.peak_memory_mib:.0f} MiB"),
            )
        ),
        f"{estimate.disk_mib:.0f} MiB",
    ]


def _setting(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"--slurm takes NAME=VALUE, e.g. slurm_partition=gpu; {text!r} is none.")
    found = yaml.safe_load(value)
    if ":" in value and isinstance(found, (int, float)):  # seconds for yaml, and minutes for submitit
        raise ValueError(f"--slurm {text}: times are in minutes, e.g. timeout_min=720 for 12 hours.")
    return key, found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    table = commands.add_parser("table", help="run the cells of a table, and write it")
    table.add_argument("number", type=int, choices=sorted(TITLES), help="of the paper's table")
    table.add_argument(
        "--cells",
        nargs="+",
        default=[],
        metavar="NAME",
        help="cells, rows, tasks, or TASK/frozen and the like; default: all",
    )
    _add_queue_flags(table)
    table.set_defaults(run=run_table)
    sweep = commands.add_parser("sweep", help="score against trainable parameters")
    sweep.add_argument("name", choices=sorted(SWEEPS))
    sweep.add_argument("--values", nargs="+", type=int, default=[], help="instead of the sweep's own")
    _add_queue_flags(sweep)
    sweep.set_defaults(run=run_sweep)
    backbone = commands.add_parser("pretrain", help="a small backbone for tables 1 and 5 at mini scale")
    backbone.add_argument("--kind", choices=KINDS, required=True)
    backbone.add_argument("--size", choices=sorted(SIZES), default="pico")
    backbone.add_argument("--images", type=int, default=4000, help="generated scenes")
    backbone.add_argument("--iterations", type=int, default=ITERATIONS, help="of 64 images")
    backbone.add_argument("--seed", type=int, default=0)
    backbone.add_argument("--output", default=str(_PRETRAINED), metavar="DIR")
    backbone.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    backbone.add_argument("--workers", type=int, default=1, help="processes that draw the scenes")
    backbone.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="mixed precision, bfloat16; as a rule on GPUs, worth it on CPUs with AMX",
    )
    backbone.add_argument(
        "--compile",
        action="store_true",
        help="the backbone by torch.compile: minutes to compile, then faster",
    )
    backbone.set_defaults(run=run_pretrain)
    finding = commands.add_parser("findings", help="which findings of the paper hold in what has run")
    _add_place_flags(finding)
    finding.set_defaults(run=run_findings)
    report = commands.add_parser("report", help="one page of everything that has run")
    _add_place_flags(report)
    report.set_defaults(run=run_report)
    add_cka_command(commands)
    return parser


def _add_place_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", choices=("mini", "full"), default="mini")
    parser.add_argument("--output", default="output/study", metavar="DIR", help="results go to DIR/SCALE")


def _add_queue_flags(parser: argparse.ArgumentParser) -> None:
    _add_place_flags(parser)
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="run each model with seeds 1 to K")
    parser.add_argument("--configs", default="configs", metavar="DIR", help="the repository's configs folder")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY VALUE", help="over all configs")
    parser.add_argument(
        "--pretraining-iterations",
        type=int,
        default=ITERATIONS,
        metavar="N",
        help="of the small backbones of tables 1 and 5 at mini scale",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would run, and how long it would take"
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--no-probe",
        action="store_true",
        help="with --dry-run: only build the models, without weights, and count",
    )
    instead.add_argument(
        "--probe-synthetic",
        action="store_true",
        help="with --dry-run: first iterations on generated data with random weights; needs neither data nor weights",
    )
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="jobs at a time")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of CPU arithmetic, per job")
    parser.add_argument(
        "--gpus", nargs="*", type=int, default=[], metavar="NUMBER", help="shared between the jobs"
    )
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="per job")
    parser.add_argument(
        "--slurm",
        nargs="*",
        metavar="NAME=VALUE",
        help="on a cluster, with submitit's parameters, e.g. slurm_partition=gpu",
    )


if __name__ == "__main__":
    sys.exit(main())
