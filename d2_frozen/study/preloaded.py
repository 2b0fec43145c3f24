"""What every job imports. Processes of a local queue are forked from one that has it: seconds saved per job."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal

# Asking for GPUs must not start CUDA here: a process that is forked afterwards could not use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from d2_frozen import engine, tasks, train_net  # noqa: F401

for _app in (tasks.DETECTION, *tasks.APPS.values()):
    with contextlib.suppress(ImportError):
        importlib.import_module(f"{_app}.trainer")
    importlib.import_module(f"{_app}.task")

# What a cluster sends to all processes of a job is for the queue, which asks its runs to save and waits for them. This
# one, from which they are forked, must live as long: with its end they would seem to have ended.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
