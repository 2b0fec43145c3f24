"""What happens when code asks for a part of Detectron2 that the embedded engine does not have.

Importing it works, so that a project which only mentions RotatedBoxes or detectron2.export still runs; *using* it
raises one sentence, the same everywhere: the name of the missing feature, and that it needs Detectron2 itself.
What an installed Detectron2 may lack too (its compiled part) is a ModuleNotFoundError, which others catch.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from abc import ABCMeta
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NoReturn

_INSTALL = "https://detectron2.readthedocs.io/tutorials/install.html"

# Package -> its modules that are missing here and present in every installed Detectron2.
_OUTSIDE_MODULES = {
    "config": "instantiate lazy",
    "data": "benchmark",
    "data.datasets": "cityscapes_panoptic coco_panoptic lvis lvis_v0_5_categories lvis_v1_categories"
    " lvis_v1_category_image_count pascal_voc",
    "evaluation": "cityscapes_evaluation lvis_evaluation panoptic_evaluation pascal_voc_evaluation"
    " rotated_coco_evaluation",
    "export": "api c10 caffe2_export caffe2_inference caffe2_modeling caffe2_patch flatten shared torchscript"
    " torchscript_patch",
    "layers": "roi_align_rotated rotated_boxes",
    "modeling": "mmdet_wrapper",
    "modeling.backbone": "mvit regnet swin utils vit",
    "modeling.meta_arch": "dense_detector fcos panoptic_fpn retinanet",
    "modeling.proposal_generator": "rrpn",
    "modeling.roi_heads": "rotated_fast_rcnn",
    "projects": "deeplab point_rend",
    "projects.deeplab": "build_solver config loss lr_scheduler resnet semantic_seg",
    "projects.point_rend": "color_augmentation config mask_head point_features point_head roi_heads semantic_seg",
    "structures": "rotated_boxes",
    "tracking": "base_tracker bbox_iou_tracker hungarian_tracker iou_weighted_hungarian_bbox_iou_tracker utils"
    " vanilla_hungarian_bbox_iou_tracker",
    "utils": "video_visualizer",
}
_OUTSIDE_PACKAGES = ("export", "projects", "projects.deeplab", "projects.point_rend", "tracking")
_OUTSIDE = {f"detectron2.{name}" for name in _OUTSIDE_PACKAGES} | {
    f"detectron2.{package}.{name}" for package, names in _OUTSIDE_MODULES.items() for name in names.split()
}
# An installed Detectron2 can be without these, so code that asks for them is prepared for an ImportError.
_OPTIONAL = ("detectron2._C", "detectron2.projects.panoptic_deeplab")


def outside_message(feature: str) -> str:
    """The text for one missing feature, e.g. ``detectron2.export``."""
    return (
        f"{feature} is outside the subset of Detectron2 that ships inside d2_frozen. "
        f"It needs Detectron2 itself: install it ({_INSTALL}); d2_frozen then uses it by itself."
    )


class _OutsideType(ABCMeta):
    """Type of placeholders: classes that exist and can be inherited from, but neither called nor looked into.

    ABCMeta, so that a class may inherit from a placeholder and from an abstract class of its own.
    """

    _feature: str

    def _refuse(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(outside_message(cls._feature))

    __call__ = __iter__ = __getitem__ = _refuse

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):  # how Python and its tools look around; that is no use of the feature
            raise AttributeError(name)
        cls._refuse()


def placeholder(module_name: str, name: str) -> type:
    """Stands for a class, function or constant that is missing in a module."""
    feature = f"{module_name}.{name}"
    return _OutsideType(
        name, (), {"__module__": module_name, "__doc__": outside_message(feature), "_feature": feature}
    )


def outside_subset(module_name: str, names: Iterable[str]) -> Callable[[str], Any]:
    """A module-level ``__getattr__`` that stands in for known names of Detectron2 which are missing here.

    Args:
        module_name: ``__name__`` of the module.
        names: public names that the original has in this place and the embedded engine has not.
    Returns:
        A function for ``__getattr__ = ...``: a placeholder for these names, AttributeError for any other.
        Calling a placeholder or reading its attributes raises NotImplementedError.
    """
    known = frozenset(names)

    @functools.cache
    def __getattr__(name: str) -> Any:
        if name not in known:
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}")
        return placeholder(module_name, name)

    return __getattr__


class _OutsideModule(ModuleType):
    """A module of placeholders, one for any public name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = placeholder(self.__name__, name)
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        # Importing config.instantiate puts the module in the place of the function of that name in config.
        raise NotImplementedError(outside_message(self.__name__))


class _OutsideModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last finder on ``sys.meta_path``: reached only for ``detectron2.*`` modules that no file provides."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in _OUTSIDE:
            is_package = fullname.removeprefix("detectron2.") in _OUTSIDE_PACKAGES
            return importlib.machinery.ModuleSpec(fullname, self, is_package=is_package)
        if fullname in _OPTIONAL:
            raise ModuleNotFoundError(outside_message(f"module {fullname}"), name=fullname)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _OutsideModule(spec.name, outside_message(f"module {spec.name}"))

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the names appear when they are asked for."""


def explain_missing_modules() -> None:
    """Install the import hook once."""
    if not any(isinstance(finder, _OutsideModules) for finder in sys.meta_path):
        sys.meta_path.append(_OutsideModules())
