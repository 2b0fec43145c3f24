"""A run in several processes: one per GPU, on one machine or more. Who stops it, stops all of them, after saving."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from d2_frozen.data.workers import NOTICES
from detectron2.engine import default_argument_parser, launch


def run_processes(
    function: Callable[..., Any], args: argparse.Namespace, *more: Any, dist_url: str = ""
) -> None:
    """``function(args, *more)`` in as many processes as ``--num-gpus`` and ``--num-machines`` say.

    With one process it is called here. With several, signals to this process (NOTICES, Ctrl-C) reach all as SIGTERM,
    as does its death; trainings save and leave then (``SaveAndLeaveOnSignal``), and this one as a single one would.
    A second Ctrl-C ends them at once.

    Args:
        dist_url: where the processes meet, instead of ``args.dist_url``.
    """
    several = args.num_gpus * args.num_machines > 1
    with _passing_on_notices() if several else _ended_by_ctrl_c():
        launch(
            _in_process,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=dist_url or _free_address(args.dist_url, args.num_machines),
            args=(function, os.getpid(), args, *more),
        )


def _free_address(dist_url: str, num_machines: int) -> str:
    """``--dist-url``; where that is the user's default port, and another run of his has it, one that is free."""
    if num_machines > 1 or dist_url != default_argument_parser().get_default("dist_url"):
        return dist_url
    address = urlsplit(dist_url)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As torch's store does, which may listen where connections of an earlier run still close.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.hostname, address.port))
        except OSError:
            return "auto"
    return dist_url


def _in_process(function: Callable[..., Any], parent: int, *arguments: Any) -> None:
    if os.getpid() != parent:
        _leave_with(parent)
    function(*arguments)


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:  # where anything was saved, the log says it
        sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def _passing_on_notices() -> Iterator[None]:
    told = 0

    def tell(number: int, frame: FrameType | None) -> None:
        nonlocal told
        at_once = told == number == signal.SIGINT
        told = number
        for process in multiprocessing.active_children():
            if process.pid:
                os.kill(process.pid, signal.SIGKILL if at_once else signal.SIGTERM)

    # Those that somebody else has a handler for (submitit) are left to him.
    nobody = (signal.SIG_DFL, signal.default_int_handler)
    free = [
        number
        for number in (*NOTICES, signal.SIGINT)
        if number == signal.SIGTERM or signal.getsignal(number) in nobody
    ]
    before = {number: signal.signal(number, tell) for number in free}
    try:
        yield
        if told == signal.SIGINT:  # torch lets a process that Ctrl-C has ended count as one that is through
            sys.exit(128 + told)
    except Exception:
        if told:
            sys.exit(128 + told)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_with(parent: int) -> None:
    """torch tells a process by SIGINT that its parent has died; it then gets SIGTERM. Other SIGINTs are as before."""
    before = signal.getsignal(signal.SIGINT)

    def answer(number: int, frame: FrameType | None) -> None:
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
        elif callable(before):
            before(number, frame)

    signal.signal(signal.SIGINT, answer)
