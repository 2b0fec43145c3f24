"""Samples that cannot be handed on by a worker: an error that says what to do, where torch would wait for ever."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from tiny_runs import Flags

from d2_frozen.data import build_test_loader, build_train_loader
from d2_frozen.data.loader import SampleError
from d2_frozen.data.workers import hand_on
from d2_frozen.train_net import setup

FULL = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker, which is forked from here, finds shared memory as a container of Docker's has it."""

    def fail(storage: torch.UntypedStorage) -> None:
        raise RuntimeError(FULL)

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", fail)
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("workers are not forked here")


def test_training_says_that_shared_memory_is_full(flags: Flags, full: None) -> None:
    cfg = setup(flags("DATALOADER.NUM_WORKERS", "1"))
    with pytest.raises(SampleError, match=r"No space left on device.*/dev/shm has.*--shm-size.*NUM_WORKERS"):
        next(iter(build_train_loader(cfg)))


def test_evaluation_says_so_too(flags: Flags, full: None) -> None:
    cfg = setup(flags("DATALOADER.NUM_WORKERS", "1"))
    with pytest.raises(RuntimeError, match=r"No space left on device.*/dev/shm has.*--shm-size.*NUM_WORKERS"):
        next(iter(build_test_loader(cfg, cfg.DATASETS.TEST[0])))


def test_without_workers_nothing_is_shared(full: None) -> None:
    sample = {"image": torch.zeros(3, 4, 4)}
    assert hand_on([sample])[0] is sample and not sample["image"].is_shared()


def test_no_place_for_semaphores_is_no_full_disk(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = setup(flags("DATALOADER.NUM_WORKERS", "1"))

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.utils.data.DataLoader, "_get_iterator", fail)
    with pytest.raises(OSError, match="workers cannot be started: No space left.*/dev/shm has.*--shm-size"):
        next(iter(build_train_loader(cfg)))


def test_open_files_are_allowed_as_far_as_the_process_may(flags: Flags) -> None:
    resource = pytest.importorskip("resource")
    cfg = setup(flags("DATALOADER.NUM_WORKERS", "1"))
    before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = 512
    if soft <= low:
        pytest.skip("the limit is low already")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (low, hard))
        next(iter(build_train_loader(cfg)))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > low
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
