"""To which sizes must images be padded for a neck on this bottom-up network?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from detectron2.modeling.backbone import Backbone


class PadsForBottomUp:
    """Mixin for a Backbone with ``bottom_up`` and ``in_features``: padding rules that suit both.

    A pyramid needs sides that divide by the stride of its coarsest input; the bottom-up network may need
    more, or square images. The meta-architecture reads both properties when it batches images.
    """

    bottom_up: Backbone
    in_features: Sequence[str]

    @property
    def size_divisibility(self) -> int:
        shapes = self.bottom_up.output_shape()
        stride = max(shapes[name].stride for name in self.in_features)
        return math.lcm(stride, max(1, self.bottom_up.size_divisibility))

    @property
    def padding_constraints(self) -> dict[str, int]:
        return dict(self.bottom_up.padding_constraints)
