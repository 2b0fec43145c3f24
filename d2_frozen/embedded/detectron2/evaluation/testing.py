"""What to do with a results dict: flatten it for logging, print it, compare it with expected values.

A results dict is nested by task: ``{"bbox": {"AP": 41.2, "AP50": 60.1}, "segm": {...}}``.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["flatten_results_dict", "print_csv_format", "verify_results"]


def flatten_results_dict(results: Mapping[str, Any]) -> dict[str, Any]:
    """``{"bbox": {"AP": 1.0}}`` -> ``{"bbox/AP": 1.0}``, at any depth, order kept."""
    return dict(_leaves(results, ()))


def _leaves(node: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        path = (*above, str(name))
        if isinstance(value, Mapping):
            yield from _leaves(value, path)
        else:
            yield "/".join(path), value


def print_csv_format(results: Mapping[str, Any]) -> None:
    """Log the main metrics as two comma-separated lines per task, ready to paste into a table.

    Per-category entries (names with a ``-``, such as ``AP-person``) are left out. The lines start with
    ``copypaste:``.

    Raises:
        TypeError: ``results`` is no mapping.
    """
    if not isinstance(results, Mapping):
        raise TypeError(f"results must be a dict of tasks, got {type(results).__name__}: {results!r}")
    log = logging.getLogger(__name__)
    for task, metrics in results.items():
        if not isinstance(metrics, Mapping):
            log.info("copypaste: %s=%s", task, metrics)
            continue
        shown = [name for name in metrics if "-" not in name]
        log.info("copypaste: Task: %s", task)
        log.info("copypaste: %s", ",".join(shown))
        log.info("copypaste: %s", ",".join(format(metrics[name], ".4f") for name in shown))


def verify_results(cfg: Any, results: Mapping[str, Mapping[str, float]]) -> bool:
    """Compare with ``cfg.TEST.EXPECTED_RESULTS``, a list of (task, metric, expected value, tolerance).

    Returns:
        True when nothing is expected or all is within tolerance.
    Raises:
        SystemExit: code 1 when a metric is missing, not finite, or off by more than its tolerance; the log
            says which.
    """
    expected = cfg.TEST.EXPECTED_RESULTS
    complaints = []
    for task, metric, wanted, tolerance in expected:
        seen = results.get(task, {}).get(metric)
        # "not <=" rather than ">": NaN must not pass.
        if seen is None:
            complaints.append(f"{task}/{metric} is not among the results")
        elif not math.isfinite(seen) or not abs(seen - wanted) <= tolerance:
            complaints.append(f"{task}/{metric} is {seen}, expected {wanted} within {tolerance}")
    log = logging.getLogger(__name__)
    if complaints:
        log.error("Result verification failed: %s. Results: %s", "; ".join(complaints), dict(results))
        sys.exit(1)
    if len(expected):
        log.info("Results verification passed.")
    return True
