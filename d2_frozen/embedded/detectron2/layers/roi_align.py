"""ROIAlign: bilinear samples inside a box, averaged per cell (Mask R-CNN, arXiv:1703.06870, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torchvision.ops import roi_align

from detectron2.layers import _roi_align_cpu

__all__ = ["ROIAlign", "roi_align"]


class ROIAlign(nn.Module):
    """Crop each box out of a feature map and resample it to one size."""

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = True,
    ) -> None:
        """
        Args:
            output_size: (height, width) of the result in cells.
            spatial_scale: feature cells per box unit: 1 / stride for boxes in image pixels.
            sampling_ratio: samples per cell and axis; 0 takes as many as the cell covers feature cells.
            aligned: whether cell i covers [i, i + 1) (true to the geometry); False puts its centre at i, half
                a cell off, as the first implementations did.
        """
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """
        Args:
            input: (B, C, H, W).
            rois: (R, 5): image index, then XYXY.
        Returns:
            (R, C, output height, output width) in the dtype of ``input``. Computed in float32 also for half
            floats: bfloat16 has 8 bits, which would move a box at 600 pixels by up to two.
        """
        assert rois.dim() == 2 and rois.shape[1] == 5, f"rois want shape (R, 5), got {rois.shape}"
        if input.is_quantized:
            input = input.dequantize()
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript would compile both sides of an "and"
            if _roi_align_cpu.pays([input], rois, _pair(self.output_size)):
                return self._on_cpu(input, rois)
        exact = torch.float64 if input.dtype == torch.float64 else torch.float32
        pooled = roi_align(
            input.to(exact),
            rois.to(exact),
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        )
        return pooled.to(input.dtype)

    def _on_cpu(self, input: Tensor, rois: Tensor) -> Tensor:
        level = torch.zeros(len(rois), dtype=torch.long)
        scales = [self.spatial_scale]
        return _roi_align_cpu.roi_align_pyramid(
            [input], rois, level, _pair(self.output_size), scales, self.sampling_ratio, self.aligned
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )
