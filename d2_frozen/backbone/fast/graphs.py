"""A network on CUDA without the time that Python takes to start its kernels: one recorded graph for each image size.

In: a network whose work depends on the size of the images only.  Out: the same maps, by ``torch.cuda.CUDAGraph``.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# A graph keeps its maps and a copy of its images; what lies between is shared by all.
_KEPT_GRAPHS = 8


class Recorded(NamedTuple):
    """A graph, and what it reads and writes."""

    graph: Any
    images: Tensor
    maps: dict[str, Tensor]
    kept: Any  # what else the graph reads, and nobody else may keep


class GraphPerSize(nn.Module):
    """Records the network at the second batch of a size, and replays it from then on.

    Of the first sizes for which there is room: where more of them take turns, each would push out the one that comes
    next, and recording takes longer than running. Where recording fails, for want of memory perhaps, no further size is
    recorded, and the log says so.

    Args:
        network: has ``prepare(images)``, everything that depends on the size alone, and ``run(images, prepared)``.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self._graphs: dict[tuple, Recorded] = {}
        self._seen: Counter[tuple] = Counter()
        self._pool: Any = None
        self._stream: Any = None
        # A graph reads and writes the same memory for everybody: threads take turns.
        self._lock = threading.Lock()
        self._records = True

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) on CUDA -> {name: (B, C, h, w)}."""
        with self._lock:
            return self._replay(images)

    def _replay(self, images: Tensor) -> dict[str, Tensor]:
        key = (images.shape, images.dtype, images.device)
        if key not in self._graphs:
            self._seen[key] += 1
            if self._seen[key] == 1 or len(self._graphs) == _KEPT_GRAPHS or not self._records:
                return self.network(images)
            before = torch.cuda.current_stream(images.device) if images.is_cuda else None
            try:
                self._graphs[key] = self._record(images)
            except RuntimeError as err:
                if before is not None:
                    torch.cuda.set_stream(before)  # a recording that breaks off stays on its own
                self._records = False
                logger.warning(
                    "MODEL.FROZEN.COMPILE: images of %s run unrecorded, and further sizes too, as recording them "
                    "failed (%s: %s).",
                    tuple(images.shape),
                    type(err).__name__,
                    (str(err).strip().splitlines() or [""])[0][:200],
                )
                return self.network(images)
        recorded = self._graphs[key]
        recorded.images.copy_(images)
        recorded.graph.replay()
        # The next replay writes over them.
        return {name: feature.clone() for name, feature in recorded.maps.items()}

    def _record(self, images: Tensor) -> Recorded:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            # torch's own is one for all, on the GPU that was current when it was made. Graphs of one pool share memory
            # if they are recorded on one stream.
            self._stream = torch.cuda.Stream(images.device)
        own = images.clone()
        prepared = self.network.prepare(own)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": a loader's thread may pin memory meanwhile.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with torch.cuda.device(images.device), recording:
            maps = self.network.run(own, prepared)
        return Recorded(graph, own, maps, prepared)
