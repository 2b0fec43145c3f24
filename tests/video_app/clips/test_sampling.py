"""Places of clips, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from video_app.clips.crops import KINDS, Crop, TrainCrop, view_crops
from video_app.clips.sampling import SamplingPlan


def times(count: int, fps: float = 25.0) -> np.ndarray:
    return np.arange(count) / fps


def test_dense_by_hand() -> None:
    """4 frames, stride 3 span 10 of 30 frames: 21 starts. One clip: 10; two: 5 and 15."""
    assert SamplingPlan("dense", 4, 3).indices(times(30)).tolist() == [[10, 13, 16, 19]]
    assert SamplingPlan("dense", 4, 3, clips=2).indices(times(30))[:, 0].tolist() == [5, 15]
    starts = {
        int(SamplingPlan("dense", 4, 3, draws=(u,)).indices(times(30))[0, 0])
        for u in np.linspace(0, 0.999, 200)
    }
    assert starts == set(range(21))


def test_uniform_by_hand() -> None:
    """Parts of 5 frames: their middles; with two clips, at a quarter and three quarters."""
    assert SamplingPlan("uniform", 4).indices(times(20)).tolist() == [[2, 7, 12, 17]]
    assert SamplingPlan("uniform", 4, clips=2).indices(times(20)).tolist() == [[1, 6, 11, 16], [3, 8, 13, 18]]
    drawn = SamplingPlan("uniform", 4, draws=(0.0, 0.99, 0.5, 0.2)).indices(times(20))
    assert drawn.tolist() == [[0, 9, 12, 16]]


@pytest.mark.parametrize("kind", ["dense", "uniform"])
@pytest.mark.parametrize("fps", [0.0, 10.0, 60.0])
def test_every_length_gives_frames_that_exist_in_order(kind: str, fps: float) -> None:
    random = np.random.default_rng(0)
    for count in (1, 2, 3, 7, 50, 301):
        for plan in (SamplingPlan(kind, 8, 4, fps, clips=3), SamplingPlan(kind, 8, 4, fps).drawn(random)):
            indices = plan.indices(times(count))
            assert indices.shape == (plan.clips, 8) and indices.dtype == np.int64
            assert indices.min() >= 0 and indices.max() < count and (np.diff(indices) >= 0).all()


def test_a_short_video_holds_its_last_frame() -> None:
    assert SamplingPlan("dense", 4, 3).indices(times(5)).tolist() == [[0, 3, 4, 4]]


def test_by_time_the_rate_does_not_matter() -> None:
    """The same moments of the same scene at 25 and 50 frames per second."""
    plan = SamplingPlan("dense", 4, 2, fps=25.0)
    slow, fast = plan.indices(times(40, 25.0)), plan.indices(times(80, 50.0))
    assert (fast // 2 == slow).all()


def test_plans_are_functions_of_their_seed() -> None:
    plans = [SamplingPlan("uniform", 8).drawn(np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("wrong", [{"kind": "sparse"}, {"frames": 0}, {"fps": -1.0}, {"draws": (0.1, 0.2)}])
def test_wrong_plans(wrong: dict) -> None:
    with pytest.raises(ValueError):
        SamplingPlan(**wrong)


def test_view_crops_lie_along_the_longer_side() -> None:
    assert [crop.left for crop in view_crops(10, 30, 3, 10)] == [0, 10, 20]
    assert [crop.top for crop in view_crops(31, 10, 2, 24)] == [0, 21]
    assert view_crops(10, 30, 1, 10) == [Crop(0, 10, 10, 10)]


def test_views_show_as_many_pixels_as_training_crops() -> None:
    """VIDEO.TEST.SHORT_SIDE 256 and CROP_SIZE 224 are what they are elsewhere: squares of 224 in the middle."""
    assert view_crops(256, 340, 3, 224) == [Crop(16, left, 224, 224) for left in (0, 58, 116)]
    assert view_crops(340, 256, 1, 224) == [Crop(58, 16, 224, 224)]
    for size in ((112, 149), (149, 112), (96, 96), (50, 200)):
        trained = TrainCrop("centre", 96, flip=False).draw(*size, np.random.default_rng(0))
        assert view_crops(*size, 1, 96) == [trained]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(48, 80), (200, 20), (1, 1)])
def test_training_crops_lie_inside(kind: str, size: tuple[int, int]) -> None:
    draw, again = (np.random.default_rng(3) for _ in range(2))
    crop = TrainCrop(kind, 32)
    for _ in range(50):
        c = crop.draw(*size, draw)
        assert c.top >= 0 and c.left >= 0 and c.top + c.height <= size[0] and c.left + c.width <= size[1]
        assert c == crop.draw(*size, again)


def test_a_crop_is_the_same_for_all_frames_and_flips_only_if_it_may() -> None:
    frames = np.broadcast_to(
        np.random.default_rng(0).integers(0, 256, (1, 40, 60, 3), np.uint8), (5, 40, 60, 3)
    )
    cut = Crop(3, 4, 20, 20, flip=True).of(frames, 20)
    assert (cut == cut[0]).all() and np.array_equal(cut[0], frames[0, 3:23, 4:24][:, ::-1])
    random = np.random.default_rng(0)
    assert 20 < sum(TrainCrop("centre", 32).draw(40, 60, random).flip for _ in range(60)) < 40
    assert not any(TrainCrop("centre", 32, flip=False).draw(40, 60, random).flip for _ in range(60))
