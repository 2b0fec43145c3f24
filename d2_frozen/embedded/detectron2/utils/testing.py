"""What tests of detectors need again and again: random boxes, comparable detections, models without weights."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from detectron2 import model_zoo
from detectron2._outside import outside_subset
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, ROIMasks
from detectron2.utils.file_io import PathManager

__getattr__ = outside_subset(
    __name__,
    (
        "convert_scripted_instances",
        "has_dynamic_axes",
        "register_custom_op_onnx_export",
        "reload_lazy_config",
        "skipIfUnsupportedMinOpsetVersion",
        "skipIfUnsupportedMinTorchVersion",
        "unregister_custom_op_onnx_export",
    ),
)

_SAMPLE_IMAGE = "http://images.cocodataset.org/val2017/000000000139.jpg"


def get_model_no_weights(config_path: str) -> nn.Module:
    """The model of a config of the zoo as it is before training; on the CPU if there is no GPU.

    Args:
        config_path: as for ``model_zoo.get_config``.
    """
    cfg = model_zoo.get_config(config_path)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


def random_boxes(num_boxes: int, max_coord: float = 100, device: str | torch.device = "cpu") -> Tensor:
    """(N, 4) XYXY boxes in 1 .. ``max_coord``, in the order of torch's generator: corner, then sides.

    Each of these four numbers is between 1 and half of ``max_coord``.
    """
    numbers = (torch.rand(num_boxes, 4, device=device) * (max_coord * 0.5)).clamp(min=1.0)
    corner, sides = numbers.split(2, dim=1)
    return torch.cat((corner, corner + sides), dim=1)


def get_sample_coco_image(tensor: bool = True) -> Tensor | np.ndarray:
    """A photograph: the first image of coco_2017_val_100 if it is here, else one from the web.

    Args:
        tensor: (3, H, W) uint8 tensor instead of (H, W, 3) array.
    Returns:
        BGR, 0..255.
    """
    try:
        path = DatasetCatalog.get("coco_2017_val_100")[0]["file_name"]
    except FileNotFoundError:
        path = ""
    if not Path(path).is_file():
        path = PathManager.get_local_path(_SAMPLE_IMAGE)
    image = read_image(path, format="BGR")
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))) if tensor else image


def assert_instances_allclose(
    input: Instances, other: Instances, *, rtol: float = 1e-5, msg: str = "", size_as_tensor: bool = False
) -> None:
    """Fail unless both have the same fields with about the same numbers.

    Args:
        input, other: fields are tensors, Boxes or ROIMasks.
        rtol: by how much floats may differ, relative to the largest magnitude of the field in ``input``.
        msg: put in front of the failure.
        size_as_tensor: image sizes may be tensors, as tracing returns them.
    Raises:
        AssertionError: image size, names of the fields, or values differ.
        TypeError: a field of another type.
    """
    sizes = (input.image_size, other.image_size)
    if size_as_tensor:
        sizes = tuple([int(side) for side in size] for size in sizes)
    assert sizes[0] == sizes[1], f"{msg} image sizes differ: {sizes[0]} and {sizes[1]}"
    names = [sorted(one.get_fields()) for one in (input, other)]
    assert names[0] == names[1], f"{msg} fields differ: {names[0]} and {names[1]}"
    for name in names[0]:
        first, second = _numbers(name, input.get(name)), _numbers(name, other.get(name))
        where = f"{msg} field {name!r}"
        assert first.shape == second.shape, (
            f"{where} has shape {tuple(first.shape)} and {tuple(second.shape)}"
        )
        if not first.is_floating_point():
            assert torch.equal(first, second), f"{where} differs: {first} and {second}"
        elif first.numel() > 0:
            worst, allowed = (first - second).abs().max().item(), first.abs().max().item() * rtol
            assert worst <= allowed, f"{where} differs by up to {worst}; allowed are {allowed}"


def _numbers(name: str, field: Tensor | Boxes | ROIMasks) -> Tensor:
    if isinstance(field, (Boxes, ROIMasks)):
        return field.tensor
    if not isinstance(field, Tensor):
        raise TypeError(f"field {name!r} holds {type(field).__name__}, which cannot be compared")
    return field


def reload_script_model(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A scripted module written to memory and read back, which shows what does not survive saving."""
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)
