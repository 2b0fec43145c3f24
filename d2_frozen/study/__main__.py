"""The paper's experiments as commands.

python -m d2_frozen.study table 2 --scale mini --seeds 3 --parallel 2
python -m d2_frozen.study table 6 --scale mini --cells percent_1_frozen percent_1_full
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path

from tabulate import tabulate

from d2_frozen.study.jobs import Job
from d2_frozen.study.layout import Results, write_table
from d2_frozen.study.queue import LocalQueue
from d2_frozen.study.tables import TITLES, Cell, cells_of

logger = logging.getLogger("d2_frozen.study")

# What the mini scale trains on, by task: commands that generate it, and do nothing where it is complete.
_WORLDS = {
    "detection": ["d2_frozen.data.shapes", "--output", "datasets/shapes"],
    "segmentation": ["d2_frozen.data.shapes", "--output", "datasets/shapes"],
    "video": ["video_app.moving_shapes", "--output", "datasets/moving_shapes"],
}


def main(arguments: list[str] | None = None) -> int:
    """Command line.

    Returns:
        The exit code: 1 if a job has not finished.
    """
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        return args.run(args)
    except (FileNotFoundError, ValueError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2


def run_table(args: argparse.Namespace) -> int:
    """``table``: run what has not finished of a table, then write the table of what has."""
    cells = cells_of(args.number, args.scale, args.configs, args.cells)
    seeds = range(1, args.seeds + 1)
    jobs = {cell: cell.jobs(seeds, args.options) for cell in cells}
    root = Path(args.output) / args.scale
    # Seed by seed, so that an early table has a value in every cell.
    in_order = [job for of_seed in zip(*jobs.values()) for job in of_seed]
    if args.dry_run:
        print(_plan(in_order, root))
        return 0
    if args.scale == "mini":
        _generate({cell.task for cell in cells})
    queue = LocalQueue(root, args.parallel, args.threads, args.gpus, args.num_gpus)
    left = queue.run(in_order)
    results = _results(jobs, root)
    path = write_table(results, args.number, root)
    print(path.read_text())
    print(f"written to {path}, .csv and .png beside it")
    for job in left:
        failure = job.failure(root)
        reason = failure["error"] if failure else "not finished"
        print(f"{job.name}: {reason}", file=sys.stderr)
    return 1 if left else 0


def _results(jobs: dict[Cell, list[Job]], root: Path) -> Results:
    return {
        cell: [result for job in of_cell if (result := job.result(root)) is not None]
        for cell, of_cell in jobs.items()
    }


def _plan(jobs: list[Job], root: Path) -> str:
    rows = []
    for job in jobs:
        state = "finished" if job.result(root) is not None else "failed" if job.failure(root) else "to do"
        rows.append([job.name, job.config_file, state])
    return tabulate(rows, headers=["job", "config", "state"])


def _generate(task_names: set[str]) -> None:
    for command in {tuple(_WORLDS[task]) for task in task_names}:
        subprocess.run([sys.executable, "-m", *command], check=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_frozen.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    table = commands.add_parser("table", help="run the cells of a table, and write it")
    table.add_argument("number", type=int, choices=sorted(TITLES), help="of the paper's table")
    table.add_argument("--cells", nargs="+", default=[], metavar="NAME", help="cells or tasks; default: all")
    table.add_argument(
        "--options", nargs="*", default=[], metavar="KEY VALUE", help="over the configs of all cells"
    )
    table.add_argument("--dry-run", action="store_true", help="say what would run")
    _add_common(table)
    table.set_defaults(run=run_table)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", choices=("mini", "full"), default="mini")
    parser.add_argument("--seeds", type=int, default=1, metavar="K", help="run each cell with seeds 1 to K")
    parser.add_argument("--configs", default="configs", metavar="DIR", help="the repository's configs folder")
    parser.add_argument("--output", default="output/study", metavar="DIR")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="jobs at a time")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="of CPU arithmetic, per job")
    parser.add_argument(
        "--gpus", nargs="*", type=int, default=[], metavar="NUMBER", help="shared between the jobs"
    )
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="per job")


if __name__ == "__main__":
    sys.exit(main())
