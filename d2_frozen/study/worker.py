"""Run one job in this process: ``train_net`` in the job's folder, then ``result.json``.

A job that was interrupted goes on from its last checkpoint, and ends as an uninterrupted one would.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2_frozen.claims import claimed
from d2_frozen.files import by_the_way
from d2_frozen.study.jobs import FAILURE_FILE, Job, write_json


def run_job(
    job: Job, root: str | Path, threads: int = 0, gpus: Sequence[int] = (), num_gpus: int = 1
) -> bool:
    """
    Args:
        root: folder of the study.
        threads: of CPU arithmetic in this process; 0 leaves them as they are.
        gpus: numbers of the GPUs to use; empty for whatever is visible.
        num_gpus: processes of the run, one per GPU.
    Returns:
        Has it finished? If not, ``failed.json`` says why.
    """
    folder = job.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder / ".job_in_use", wait=True):  # a second queue waits here for the first's job
        # Of an earlier try: what is there afterwards is of this one.
        (folder / FAILURE_FILE).unlink(missing_ok=True)
        try:
            use_gpus(gpus)
            job.check_settings(root)
            if job.result(root) is not None:
                return True
            job.write_settings(root)
            _run(job, Path(root), threads, num_gpus)
        except Exception as err:
            failure = {"error": f"{type(err).__name__}: {err}", "traceback": traceback.format_exc()}
            with by_the_way(f"Why {job.name} failed is not written"):
                write_json(folder / FAILURE_FILE, failure)
            return False
        return True


def use_gpus(gpus: Sequence[int]) -> None:
    """No other GPUs than these, in this process and those that it starts; ValueError if there are none such."""
    if not gpus:
        return
    import torch

    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    if torch.cuda.device_count() < len(set(gpus)):
        raise ValueError(
            f"--gpus: torch sees {torch.cuda.device_count()} GPUs with CUDA_VISIBLE_DEVICES="
            f"{os.environ['CUDA_VISIBLE_DEVICES']}. Leave the flag out to run on the CPU."
        )


def run_job_in_process(job: Job, root: str, threads: int, gpus: Sequence[int], num_gpus: int) -> None:
    """As :func:`run_job`, for a process of its own: what it prints goes to ``output.txt``, and the exit code tells."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the queue, which asks its jobs to save and leave
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not that of preloaded.py
    folder = job.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(0 if run_job(job, root, threads, gpus, num_gpus) else 1)


def _run(job: Job, root: Path, threads: int, num_gpus: int) -> None:
    from d2_frozen import train_net
    from d2_frozen.processes import run_processes

    folder = job.folder(root)
    options = [*job.options, "OUTPUT_DIR", str(folder)]
    flags = ["--config-file", job.config_file, "--num-gpus", str(num_gpus)]
    if job.evaluates is None:
        flags += ["--resume"]
    else:
        flags += ["--eval-only"]
        options += ["MODEL.WEIGHTS", str(root / job.evaluates / "model_final.pth")]
    args = train_net.argument_parser().parse_args([*flags, *options])
    # Not the parser's address, which is the same for all runs on a machine.
    run_processes(_train_and_record, args, job, str(folder), threads, dist_url="auto")


def _train_and_record(args: argparse.Namespace, job: Job, folder: str, threads: int) -> None:
    import torch

    from d2_frozen import train_net
    from d2_frozen.benchmarks.measuring import source_commit
    from detectron2.utils import comm

    source_commit()  # now, not of the tree as it is in the end
    if threads:
        import cv2

        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
    resumed = args.resume and Path(folder, "last_checkpoint").is_file()
    begun = time.monotonic()
    metrics = train_net.main(args) or {}  # nothing where DATASETS.TEST is empty
    if not comm.is_main_process():
        return
    about = about_run(Path(folder))
    write_json(
        Path(folder) / "result.json",
        {
            "job": job.name,
            "config_file": job.config_file,
            "options": list(job.options),
            **metrics_of_first(metrics, about["test_sets"]),
            "seconds_of_last_start": time.monotonic() - begun,
            "resumed": resumed,
            **about,
        },
    )


def metrics_of_first(results: Mapping[str, Any], test_sets: Sequence[str]) -> dict[str, Any]:
    """What tables show of a run with several test sets: the first one's metrics; the others stand beside them.

    Args:
        results: as ``DefaultTrainer.test`` gives them: task -> metrics, of several sets set -> task -> metrics. With
            TEST.AUG there are others whose first key ends in ``_TTA``.
    Returns:
        {"metrics": task -> metrics}, and {"metrics_of_sets": results} of several.
    """
    if len(set(test_sets)) < 2 or test_sets[0] not in results:
        return {"metrics": results}
    augmented = results.get(f"{test_sets[0]}_TTA", {})
    of_first = {**results[test_sets[0]], **{f"{task}_TTA": found for task, found in augmented.items()}}
    return {"metrics": of_first, "metrics_of_sets": results}


def about_run(folder: Path) -> dict[str, Any]:
    """What a reported figure must name: parameters, iterations, machine, commit."""
    from d2_frozen import tasks
    from d2_frozen.benchmarks.measuring import machine_facts
    from d2_frozen.engine.hooks import peak_memory_mib
    from d2_frozen.study.pretraining import facts_of_file
    from d2_frozen.summary import Counts, build_weightless

    cfg = tasks.read_config(folder / "config.yaml")
    counts = Counts.of(build_weightless(cfg))
    return {
        "trainable": counts.trainable,
        "parameters": counts.total,
        "iterations": cfg.SOLVER.MAX_ITER,
        "seed": cfg.SEED,
        "test_sets": list(cfg.DATASETS.TEST),
        "pretraining": facts_of_file(cfg.MODEL.TIMM.PRETRAINED),
        "peak_memory_mib": peak_memory_mib(),
        **machine_facts(),
    }
