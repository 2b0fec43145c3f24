"""EventStorage and its writers."""

from __future__ import annotations

import json
import logging

import pytest

from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
    has_event_storage,
)


def test_storages_nest():
    assert not has_event_storage()
    with EventStorage() as outer:
        with EventStorage(5) as inner:
            assert get_event_storage() is inner
            assert inner.iter == 5
        assert get_event_storage() is outer
    with pytest.raises(AssertionError):
        get_event_storage()


def test_smoothed_scalars_are_medians_and_others_are_exact():
    with EventStorage() as storage:
        for value in (1.0, 9.0, 2.0):
            storage.put_scalar("loss", value)
            storage.put_scalar("lr", value, smoothing_hint=False)
            storage.step()
        assert storage.latest_with_smoothing_hint(20) == {"loss": (2.0, 2), "lr": (2.0, 2)}
        assert storage.latest_with_smoothing_hint(1)["loss"] == (2.0, 2)
        assert storage.history("loss").median(2) == 5.5
        with pytest.raises(AssertionError):
            storage.put_scalar("lr", 1.0)


def test_window_counts_iterations_not_values():
    """Values at iterations 0, 10, 20: a window of 15 iterations holds two of them."""
    with EventStorage() as storage:
        for iteration in (0, 10, 20):
            storage.put_scalar("AP", float(iteration), cur_iter=iteration)
        assert storage.count_samples("AP", 15) == 2


def test_name_scope_prefixes():
    with EventStorage() as storage:
        with storage.name_scope("stage0"):
            storage.put_scalar("loss", 1.0)
        storage.put_scalars(loss=2.0)
        assert {name: value for name, (value, _) in storage.latest().items()} == {
            "stage0/loss": 1.0,
            "loss": 2.0,
        }


def test_json_writer_writes_each_iteration_once(tmp_path):
    file = tmp_path / "metrics.json"
    writer = JSONWriter(str(file))
    with EventStorage(3) as storage:
        storage.put_scalar("loss", 4.0)
        writer.write()
        writer.write()
        storage.step()
        storage.put_scalar("loss", 2.0)
        storage.put_scalar("bbox/AP", 0.5, smoothing_hint=False, cur_iter=4)
        writer.write()
    writer.close()
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"iteration": 3, "loss": 4.0},
        {"iteration": 4, "loss": 3.0, "bbox/AP": 0.5},
    ]


def test_printer_shows_what_people_look_for(caplog):
    logger = logging.getLogger("detectron2.utils.events")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger=logger.name), EventStorage() as storage:
            storage.put_scalars(total_loss=1.5, time=2.0, data_time=0.25)
            storage.put_scalar("lr", 0.001, smoothing_hint=False)
            storage.put_scalars(**{"[metric]positives": 12.0, "unnamed": 5.0})
            CommonMetricPrinter(max_iter=100).write()
    finally:
        logger.removeHandler(caplog.handler)
    line = caplog.messages[-1]
    for part in (
        "eta: 0:03:18",
        "iter: 0",
        "total_loss: 1.5",
        "time: 2.0000",
        "data_time: 0.2500",
        "lr: 0.001",
        "[metric]positives: 12",
    ):
        assert part in line
    assert "unnamed" not in line


def test_tensorboard_writer_clears_pictures(tmp_path):
    import torch

    writer = TensorboardXWriter(str(tmp_path))
    with EventStorage() as storage:
        storage.put_scalar("loss", 1.0)
        storage.put_image("sheet", torch.zeros(3, 4, 4, dtype=torch.uint8))
        storage.put_histogram("weights", torch.arange(10.0), bins=5)
        writer.write()
        assert not storage._vis_data
    writer.close()
    assert any(path.name.startswith("events.") for path in tmp_path.iterdir())
