"""What are classes taken for? The confusion matrix as a picture, and the most frequent mistake in words.

In: ``counts``, (K, K) numbers of pixels, videos or objects; rows are the truth, columns the prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from d2_frozen.lettering import put_text, text_width

_CELL_PX = (2, 24)  # with many classes and with few
_NAMED_CLASSES = 60


def confusion_picture(classes: Sequence[str], counts: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB: a row per true class, dark where much of it is predicted as the class of the column.

    Args:
        counts: (K, K). Rows that are empty are grey.
    """
    K = len(classes)
    named = K <= _NAMED_CLASSES
    cell = _CELL_PX[1] if named else max(_CELL_PX[0], 1200 // K)
    truth = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(truth, 1)
    light, dark = np.array([247.0, 251.0, 255.0]), np.array([8.0, 48.0, 107.0])
    cells = light + (dark - light) * np.sqrt(share)[..., None]  # the root shows small confusions
    cells[truth[:, 0] == 0] = 200
    matrix = np.kron(cells.round().astype(np.uint8), np.ones((cell, cell, 1), np.uint8))
    margin = 8 + (max(text_width(_short(name), 11) for name in classes) if named else 0)
    picture = np.full(
        (matrix.shape[0] + margin + 30, max(matrix.shape[1] + margin + 8, 230), 3), 255, np.uint8
    )
    picture[30 : 30 + matrix.shape[0], margin : margin + matrix.shape[1]] = matrix
    grey = (60, 60, 60)
    for y, line in ((12, "row: truth, column: prediction"), (25, "dark: large share of the row")):
        put_text(picture, line, (4, y), 11, grey)
    if named:
        below = np.full((margin, matrix.shape[1], 3), 255, np.uint8)
        sideways = np.ascontiguousarray(np.rot90(below, -1))
        for k, name in enumerate(classes):
            y = k * cell + cell // 2 + 4
            put_text(picture, _short(name), (4, 30 + y), 11, grey)
            put_text(sideways, _short(name), (4, y), 11, grey)
        picture[30 + matrix.shape[0] :, margin : margin + matrix.shape[1]] = np.rot90(sideways)
    return picture


def mostly_taken_for(classes: Sequence[str], counts: np.ndarray, k: int) -> str:
    """The class that class ``k`` is mistaken for most, and in how many percent of its cases; "-" for none."""
    wrong = counts[k].copy()
    wrong[k] = 0
    if not wrong.any():
        return "-"
    return f"{classes[int(wrong.argmax())]} {100 * wrong.max() / counts[k].sum():.1f} %"


def _short(name: str) -> str:
    return str(name).split(",")[0].strip()[:18]
