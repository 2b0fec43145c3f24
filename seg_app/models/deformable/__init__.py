"""Multi-scale deformable attention (arXiv 2010.04159) without a compiler: one function, three implementations."""

from seg_app.models.deformable.dispatch import IMPLEMENTATIONS, deformable_attention, implementation_for
from seg_app.models.deformable.module import MSDeformAttn, cell_centres

__all__ = ["IMPLEMENTATIONS", "MSDeformAttn", "cell_centres", "deformable_attention", "implementation_for"]
