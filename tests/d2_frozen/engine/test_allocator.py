"""The allocator is told once, and only where nobody has chosen before."""

import platform

import pytest

from d2_frozen.engine.allocator import keep_freed_memory


@pytest.fixture(autouse=True)
def untouched_environment(monkeypatch):
    for name in ("MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)


def test_glibc_takes_the_settings_and_others_are_left_alone():
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_a_choice_of_the_user_is_respected(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
