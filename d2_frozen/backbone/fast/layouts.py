"""Which token of a map stands in which attention window, and what each window may not see.

In: size of a map, window, shift.  Out: index tensors, computed once per size. Swin's roll, padding, partition, and all
of their inverses become one gather before attention and one behind it.

A shifted map has up to four kinds of windows: inside, at its last row, at its last column, in the corner. Windows are
sorted by kind, so that each kind has one (N, N) mask, not each window.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
T = TypeVar("T")

# What one position adds to the logit of another that lies in another region (Swin's own number).
MASKED = -100.0


class WindowLayout(NamedTuple):
    """Order of a batch of maps in windows, flattened over batch, rows and columns.

    Attributes:
        into: (windows * B * N,) int64: the token at each place; 0 where the place is padding.
        out_of: (B * h * w,) int64: the place of each token.
        padding: (windows * B * N,) bool, or None where nothing is padded.
        kinds: (mask number, windows of this kind times B) in the order of the places.
        places: (windows * B, N) int32: as ``into``, with -1 for padding.
        kind_of: (windows * B,) int32: mask number of each window.
    """

    into: Tensor
    out_of: Tensor
    padding: Tensor | None
    kinds: tuple[tuple[int, int], ...]
    places: Tensor
    kind_of: Tensor


def window_layout(
    batch: int, size: Size, window: Size, shift: Size, pad_first: bool, device: torch.device
) -> WindowLayout:
    """Build the layout of ``batch`` maps.

    Args:
        size: (h, w) of the map, in tokens.
        window, shift: in tokens.
        pad_first: pad, then shift (detectors of the Swin papers); else shift, then pad (timm).
    """
    height, width = size
    tokens = torch.arange(height * width).view(height, width)
    below, right = -height % window[0], -width % window[1]
    if pad_first:
        tokens = F.pad(tokens, (0, right, 0, below), value=-1)
    tokens = tokens.roll((-shift[0], -shift[1]), (0, 1))
    if not pad_first:
        tokens = F.pad(tokens, (0, right, 0, below), value=-1)
    rows, columns = tokens.shape[0] // window[0], tokens.shape[1] // window[1]
    places = tokens.view(rows, window[0], columns, window[1]).transpose(1, 2).reshape(rows * columns, -1)

    kind = torch.zeros(rows, columns, dtype=torch.long)
    kind[-1, :] += 2 * bool(shift[0])
    kind[:, -1] += bool(shift[1])
    kind, order = kind.flatten().sort(stable=True)
    numbers, counts = kind.unique_consecutive(return_counts=True)

    places = places[order][:, None]  # (windows, 1, N)
    start = (torch.arange(batch) * height * width)[:, None]
    padding = (places < 0).expand(-1, batch, -1).flatten()
    into = torch.where(places < 0, -1, places + start).flatten()  # (windows * B * N,)
    out_of = torch.empty(batch * height * width, dtype=torch.long)
    out_of[into[~padding]] = torch.arange(into.numel())[~padding]
    return WindowLayout(
        into.clamp(min=0).to(device),
        out_of.to(device),
        padding.to(device) if padding.any() else None,
        tuple((int(n), int(c) * batch) for n, c in zip(numbers, counts)),
        into.view(-1, window[0] * window[1]).int().to(device),
        kind.repeat_interleave(batch).int().to(device),
    )


def window_masks(window: Size, shift: Size) -> Tensor:
    """(4, N, N): what is added to the logits in windows of each kind, 0 or ``MASKED``.

    A window at the last row holds rows of both ends of the map: the first ``window - shift`` of them are the end.
    """
    far_rows = torch.arange(window[0]) >= window[0] - shift[0]
    far_columns = torch.arange(window[1]) >= window[1] - shift[1]
    regions = []
    for kind in range(4):
        row = far_rows.long() * (kind // 2)
        column = far_columns.long() * (kind % 2)
        regions.append((2 * row[:, None] + column[None, :]).flatten())
    region = torch.stack(regions)  # (4, N)
    return (region[:, :, None] != region[:, None, :]).float() * MASKED


class Bounded(Generic[T]):
    """A memory of the last ``limit`` things that were made, by key; for any number of threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, T] = OrderedDict()

    def __reduce__(self) -> tuple[type[Bounded], tuple[int]]:
        return Bounded, (self.limit,)  # a copy begins empty: locks cannot be copied

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is kept under ``key``, made now if it is not there; the one unused for longest goes."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            else:
                self._kept[key] = make()
                if len(self._kept) > self.limit:
                    self._kept.popitem(last=False)
            return self._kept[key]
