"""Maps that are computed some rows at a time equal those that are computed at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seg_app.models import score_maps
from seg_app.models.score_maps import ClassesOfQueries, Cut, Given, Mean, Mirrored, Resized, ScoreMap, Softmax


@pytest.fixture(params=[1, 150, 1 << 26], ids=["row by row", "a few rows", "at once"])
def numbers_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_maps, "_NUMBERS_AT_ONCE", request.param)


class Asked(Given):
    """Remembers how many rows were wanted at a time."""

    def __init__(self, numbers: torch.Tensor) -> None:
        super().__init__(numbers)
        self.most = 0

    def rows(self, start: int, stop: int) -> torch.Tensor:
        self.most = max(self.most, stop - start)
        return super().rows(start, stop)


def maps(*size: int) -> torch.Tensor:
    torch.manual_seed(sum(size))
    return torch.randn(*size)


@pytest.mark.usefixtures("numbers_at_once")
@pytest.mark.parametrize("size", [(5, 7), (13, 20), (2, 3), (1, 1), (5, 21), (40, 7)])
def test_resizing_equals_interpolate(size: tuple[int, int]) -> None:
    given = maps(3, 5, 7)
    expected = F.interpolate(given[None], size=size, mode="bilinear", align_corners=False)[0]
    found = Resized(Given(given), size)
    assert found.shape == (3, *size)
    assert torch.allclose(found.all(), expected, atol=1e-6)
    assert torch.equal(found.argmax(), found.all().argmax(0))


@pytest.mark.usefixtures("numbers_at_once")
def test_classes_of_queries() -> None:
    """Masks to 12 x 16, without padding 10 x 13, to 21 x 9: the sum over queries in the middle."""
    logits, masks = maps(6, 4), maps(6, 3, 4)
    found: ScoreMap = ClassesOfQueries(logits, Resized(Given(masks), (12, 16)))
    chance = logits.softmax(-1)[:, :3]
    full = F.interpolate(masks[None], size=(12, 16), mode="bilinear", align_corners=False)[0]
    expected = torch.einsum("qk,qhw->khw", chance, full.sigmoid())
    assert torch.allclose(found.all(), expected, atol=1e-6)
    found = Resized(Cut(found, (10, 13)), (21, 9))
    expected = F.interpolate(expected[None, :, :10, :13], size=(21, 9), mode="bilinear", align_corners=False)[
        0
    ]
    assert torch.allclose(found.all(), expected, atol=1e-6)
    assert torch.equal(found.argmax(), expected.argmax(0))


@pytest.mark.usefixtures("numbers_at_once")
def test_mean_of_a_map_and_its_mirror_image() -> None:
    given = maps(4, 6, 5)
    found = Mean([Softmax(Given(given)), Mirrored(Softmax(Given(given.flip(-1))))]).all()
    assert torch.allclose(found, given.softmax(0), atol=1e-6)


def test_a_large_map_is_never_in_memory_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 8 to 4000 rows: 2 of the 8 are wanted at a time, and what comes out is (4000, 10) classes."""
    monkeypatch.setattr(score_maps, "_NUMBERS_AT_ONCE", 2 * 10 * 100)
    given = Asked(maps(2, 8, 10))
    labels = Resized(given, (4000, 10)).argmax()
    assert labels.shape == (4000, 10) and labels.dtype == torch.int64
    assert given.most <= 3


def test_shrinking_counts_the_rows_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_maps, "_NUMBERS_AT_ONCE", 1 * 4 * 100)
    given = Asked(maps(1, 4000, 4))
    Resized(given, (50, 4)).argmax()  # a row of the result is 80 of these
    assert given.most <= 100


def test_half_precision_becomes_float32() -> None:
    assert Given(maps(2, 3, 4).bfloat16()).all().dtype == torch.float32
