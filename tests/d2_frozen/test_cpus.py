"""CPUs that a process may use: of the machine, by affinity, by its share of time."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import pytest
import torch

from d2_frozen import cpus
from d2_frozen.cpus import fit_threads, usable_cpus


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 CPUs without limits."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(cpus, "_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(cpus, "_GROUPS", tmp_path / "groups")
    return tmp_path


def write(groups: Path, process: str, **files: str) -> None:
    (groups / "cgroup").write_text(process)
    for name, content in files.items():
        path = groups / "groups" / name.replace("__", "/").replace("_max", ".max")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_without_groups_all_of_the_affinity(groups: Path) -> None:
    assert usable_cpus() == 64


@pytest.mark.parametrize(
    ("limit", "count"),
    [
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("max 100000", 64),
        ("9900000 100000", 64),
    ],
)
def test_a_share_of_time_counts_in_whole_cpus(groups: Path, limit: str, count: int) -> None:
    write(groups, "0::/\n", cpu_max=limit)
    assert usable_cpus() == count


def test_a_limit_of_a_group_above_holds_too(groups: Path) -> None:
    write(groups, "0::/slice/job\n", slice__job__cpu_max="800000 100000", slice__cpu_max="400000 100000")
    assert usable_cpus() == 4


def test_groups_of_old_kernels(groups: Path) -> None:
    write(groups, "3:memory:/\n2:cpu,cpuacct:/job\n0::/\n")
    folder = groups / "groups" / "cpu" / "job"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("300000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cpus() == 3
    (folder / "cpu.cfs_quota_us").write_text("-1\n")
    assert usable_cpus() == 64


def test_threads_are_no_more_than_cpus_unless_somebody_chose(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(groups, "0::/\n", cpu_max="200000 100000")
    before = torch.get_num_threads(), cv2.getNumThreads()
    try:
        torch.set_num_threads(8)
        monkeypatch.setenv("OMP_NUM_THREADS", "8")
        fit_threads()
        assert torch.get_num_threads() == 8
        monkeypatch.delenv("OMP_NUM_THREADS")
        fit_threads()
        assert torch.get_num_threads() == 2 and cv2.getNumThreads() <= 2
        torch.set_num_threads(1)
        fit_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])
