"""The picture sheet's layout."""

import numpy as np

from d2_frozen.detection.pictures import _grid


def test_sheet_holds_every_pair_whole() -> None:
    """Four pairs in rows of three: columns are as wide as their widest pair, rows as high as the highest."""
    sizes = [(10, 30), (20, 10), (15, 40), (12, 50)]
    sheet = _grid([np.full((h, w, 3), 10 * (i + 1), np.uint8) for i, (h, w) in enumerate(sizes)])
    assert sheet.shape == (2 * (20 + 16), 50 + 10 + 40 + 3 * 16, 3)
    for i, (h, w) in enumerate(sizes):
        assert (sheet[..., 0] == 10 * (i + 1)).sum() == h * w
