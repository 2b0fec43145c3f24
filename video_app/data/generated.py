"""Training clips without files, for measuring: as ClipMapper would give them, with frames of blurred noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from d2_frozen.data.generated import blurred_noise


def generated_clips(frames: int, size: int, count: int, num_classes: int) -> list[dict[str, Any]]:
    """``count`` samples of one view, (1, frames, 3, size, size) uint8, with a label each."""
    draw = np.random.default_rng(0)
    return [
        {
            "video": torch.stack([blurred_noise(draw, size) for _ in range(frames)])[None],
            "label": int(draw.integers(num_classes)),
            "video_id": f"generated_{number}",
        }
        for number in range(count)
    ]
