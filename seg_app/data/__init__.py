"""Images with label maps. Importing it adds the entry type ``sem_seg`` and ADE20K to the catalogs."""

from d2_frozen.data.label_maps import read_label_map
from seg_app.data import ade20k, register  # noqa: F401  (they register)
from seg_app.data.mapper import SegmentationMapper
from seg_app.data.prepare import prepare_datasets

__all__ = ["SegmentationMapper", "prepare_datasets", "read_label_map"]
