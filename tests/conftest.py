"""Shared by all tests: which Detectron2 runs, and quiet, repeatable torch."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch: the shapes in the tests are tiny, and thread pools only slow them down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tiny_runs import Flags, flags_for

import d2_frozen


def pytest_report_header(config: pytest.Config) -> str:
    return f"Detectron2 engine: {d2_frozen.engine_name()}, torch {torch.__version__}"


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _loggers_as_before() -> Iterator[None]:
    """A command makes our loggers quieter, or cuts them off from the root's, where caplog listens in the next test."""
    loggers = [logging.getLogger(name) for name in ("d2_frozen", "detectron2", "seg_app", "video_app")]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, level, propagate in before:
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture
def flags(tiny_config: Path) -> Flags:
    """For the fixture ``tiny_config`` of the room."""
    return flags_for(tiny_config)
