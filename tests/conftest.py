"""Shared by all tests: which Detectron2 runs, and quiet, repeatable torch."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch: the shapes in the tests are tiny, and thread pools only slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tiny_runs import Flags, flags_for

import d2_frozen


def pytest_configure(config: pytest.Config) -> None:
    """Tests state what holds on a CPU, bit for bit; those of a GPU are marked, and run alone: -m gpu."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for programs that tests start, too


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU, and pytest -m gpu (make test-gpu)")


def pytest_report_header(config: pytest.Config) -> str:
    return f"Detectron2 engine: {d2_frozen.engine_name()}, torch {torch.__version__}"


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT and SIGHUP as in a terminal, here and in programs that are started.

    Shells have what they start with & ignore the first, nohup the second.
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """pytest's, for our loggers too after ``setup_logger`` has cut them off from the root; each record once."""
    handler = caplog.handler
    emit, seen = handler.emit, None

    def emit_once(record: logging.LogRecord) -> None:
        nonlocal seen
        if record is not seen:
            seen = record
            emit(record)

    handler.emit = emit_once
    loggers = [
        logging.getLogger(name) for name in ("d2_frozen", "seg_app", "video_app", "detectron2", "fvcore")
    ]
    for logger in loggers:
        logger.addHandler(handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(handler)
    handler.emit = emit


@pytest.fixture
def flags(tiny_config: Path) -> Flags:
    """For the fixture ``tiny_config`` of the room."""
    return flags_for(tiny_config)
