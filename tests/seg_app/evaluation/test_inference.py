"""Windows cover an image; testing at several sizes or in pieces changes nothing where nothing should."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from seg_app.evaluation import LabelModel, MultiScaleModel, SlidingWindowModel
from seg_app.evaluation.inference import window_starts


class PixelWise(nn.Module):
    """Scores of two classes: red and its complement, at the wanted size."""

    def forward(self, batch):
        results = []
        for item in batch:
            red = item["image"][0].float() / 255
            scores = torch.stack([red, 1 - red])
            size = item.get("height", red.shape[0]), item.get("width", red.shape[1])
            results.append(
                {"sem_seg": nn.functional.interpolate(scores[None], size=size, mode="bilinear")[0]}
            )
        return results


class LeftOnly(PixelWise):
    """Class 0 in the left half, whatever is seen."""

    def forward(self, batch):
        (item,) = batch
        scores = torch.zeros(2, item["height"], item["width"])
        scores[0, :, : item["width"] // 2] = 1
        return [{"sem_seg": scores}]


@pytest.mark.parametrize(
    "length, size, overlap", [(10, 10, 0.3), (11, 10, 0.3), (100, 32, 0.0), (97, 32, 0.5), (7, 9, 0.9)]
)
def test_windows_cover_and_overlap(length: int, size: int, overlap: float) -> None:
    starts = window_starts(length, size, overlap)
    assert starts[0] == 0 and max(starts) == max(0, length - size)
    gaps = [b - a for a, b in zip(starts, starts[1:])]
    assert all(0 < gap <= size * (1 - overlap) + 1 for gap in gaps)


@pytest.mark.parametrize("size", [(40, 50), (12, 90), (16, 16), (1, 90), (90, 1)])
def test_pieces_of_a_pixelwise_model_make_the_whole(size: tuple[int, int]) -> None:
    item = {"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8)}
    whole = PixelWise()([item])[0]["sem_seg"]
    pieces = SlidingWindowModel(PixelWise(), size=16, overlap=0.4)([item])[0]["sem_seg"]
    assert torch.allclose(whole, pieces, atol=1e-6)


def test_several_sizes_of_a_constant_image_give_the_single_size_result() -> None:
    item = {"image": torch.full((3, 30, 40), 200, dtype=torch.uint8), "height": 33, "width": 44}
    single = PixelWise()([item])[0]["sem_seg"]
    several = MultiScaleModel(PixelWise(), [10, 25, 61], 200, flip=True)([item])[0]["sem_seg"]
    assert several.shape == (2, 33, 44) and torch.allclose(single, several, atol=1e-6)


def test_mirrored_copies_are_mirrored_back() -> None:
    item = {"image": torch.zeros(3, 8, 10, dtype=torch.uint8), "height": 8, "width": 10}
    scores = MultiScaleModel(LeftOnly(), [8], 100, flip=True)([item])[0]["sem_seg"]
    assert torch.equal(scores[0], torch.full((8, 10), 0.5))


def test_mode_of_the_model_is_kept() -> None:
    model = PixelWise().eval()
    assert not SlidingWindowModel(model, 16, 0.5).training and not model.training


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: SlidingWindowModel(m, 16, 0.4)], ids=["whole", "windows"]
)
def test_labels_are_the_classes_of_the_scores(wrap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("seg_app.models.score_maps._NUMBERS_AT_ONCE", 500)  # a few rows at a time
    item = {"image": torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8), "height": 70, "width": 33}
    model = wrap(PixelWise())
    expected = model([item])[0]["sem_seg"].argmax(0)
    assert torch.equal(LabelModel(model)([item])[0]["sem_seg"].argmax(dim=0), expected)
    several = MultiScaleModel(model, [20, 61], 200, flip=True)
    expected = several([item])[0]["sem_seg"].argmax(0)
    assert torch.equal(LabelModel(several)([item])[0]["sem_seg"].argmax(dim=0), expected)


def test_windows_are_looked_at_once_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows of windows one after the other, at most two of them in memory."""
    monkeypatch.setattr("seg_app.models.score_maps._NUMBERS_AT_ONCE", 1)
    seen: list[weakref.ref] = []
    alive: list[int] = []

    class Watched(PixelWise):
        def forward(self, batch):
            results = super().forward(batch)
            seen.extend(weakref.ref(result["sem_seg"]) for result in results)
            alive.append(sum(scores() is not None for scores in seen))
            return results

    item = {"image": torch.randint(0, 256, (3, 50, 16), dtype=torch.uint8)}
    LabelModel(SlidingWindowModel(Watched(), 16, 0.25))([item])
    assert alive == [1, 2, 2, 2]
