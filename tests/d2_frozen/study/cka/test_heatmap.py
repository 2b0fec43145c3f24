"""Pictures of similarities."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from d2_frozen.study.cka.heatmap import Heatmap, draw_heatmaps


@pytest.mark.parametrize("size", [1, 6, 60])
def test_colours_follow_values_and_missing_ones_are_grey(size: int) -> None:
    values = np.zeros((size, size))
    values[-1, :] = 1
    labels = [f"a.very.long.name.of.a.module.that.has.to.be.cut.{i}" for i in range(size)]
    stream = io.BytesIO()
    draw_heatmaps(stream, [Heatmap("some title", labels, labels, values)] * 2, "a caption")
    pixels = np.asarray(Image.open(stream).convert("RGB")).reshape(-1, 3)
    yellow, violet = (253, 231, 36), (68, 1, 84)  # the ends of viridis
    assert (np.abs(pixels.astype(int) - yellow).sum(1) < 6).mean() > 0.001
    assert size == 1 or (np.abs(pixels.astype(int) - violet).sum(1) < 6).mean() > 0.01
    stream = io.BytesIO()
    draw_heatmaps(stream, [Heatmap("", labels, labels, np.full((size, size), np.nan))])
    pixels = np.asarray(Image.open(stream).convert("RGB")).reshape(-1, 3)
    assert (pixels == (217, 217, 217)).all(1).mean() > 0.01
