"""Logging: files per rank, and limits on repetition."""

from __future__ import annotations

import logging

import pytest

from detectron2.utils.logger import (
    create_small_table,
    log_every_n,
    log_every_n_seconds,
    log_first_n,
    setup_logger,
)


@pytest.fixture
def heard():
    """Messages of the logger "spoken"."""
    logger, messages = logging.getLogger("spoken"), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def test_first_n_counts_the_place_or_the_message(heard):
    for number in range(4):
        log_first_n(logging.WARNING, f"a{number}", n=2, name="spoken")
        log_first_n(logging.WARNING, f"b{number % 2}", name="spoken", key="message")
    assert heard == ["a0", "b0", "a1", "b1"]


def test_every_n(heard):
    for number in range(7):
        log_every_n(logging.WARNING, str(number), n=3, name="spoken")
    assert heard == ["0", "3", "6"]


def test_every_n_seconds(heard):
    for number in range(3):
        log_every_n_seconds(logging.WARNING, str(number), n=1000, name="spoken")
    assert heard == ["0"]


def test_each_rank_has_its_file_and_only_rank_0_the_terminal(tmp_path, capsys):
    for rank in (0, 1):
        logger = setup_logger(str(tmp_path), distributed_rank=rank, name=f"ranked{rank}", color=False)
        assert setup_logger(str(tmp_path), distributed_rank=rank, name=f"ranked{rank}", color=False) is logger
        logger.info("hello from %d", rank)
    assert "hello from 0" in (tmp_path / "log.txt").read_text()
    assert "hello from 1" in (tmp_path / "log.txt.rank1").read_text()
    assert (tmp_path / "log.txt").read_text().count("hello") == 1
    printed = capsys.readouterr().out
    assert "hello from 0" in printed and "hello from 1" not in printed


def test_small_table():
    lines = create_small_table({"AP": 12.34567, "AP50": 50.0}).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["AP", "AP50"]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["12.346", "50.000"]
