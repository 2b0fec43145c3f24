"""Data by config, augmentation, and the generated world."""

from d2_frozen.data.loader import build_test_loader, build_train_loader
from d2_frozen.data.prepare import prepare_datasets, resolve_num_classes
from d2_frozen.data.problems import BadDataError
from d2_frozen.data.register import entry_type, register_from_config
from d2_frozen.data.subset import training_records
from d2_frozen.data.transforms import build_augmentations

__all__ = [
    "BadDataError",
    "build_augmentations",
    "build_test_loader",
    "build_train_loader",
    "entry_type",
    "prepare_datasets",
    "register_from_config",
    "resolve_num_classes",
    "training_records",
]
